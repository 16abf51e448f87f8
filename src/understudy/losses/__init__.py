"""Distillation losses: pure functions of (student, teacher, ...)."""

from understudy.losses.attention import attention_map, attention_transfer, salient_attention
from understudy.losses.class_priors import class_prior, class_prior_table
from understudy.losses.contrast import ContrastMemory, crd
from understudy.losses.features import embedding_alignment, hint, nst, review, vid, vid_variance
from understudy.losses.logits import (
    cross_entropy,
    dist,
    dkd,
    kl,
    mse_logits,
    standardized_kl,
    top_k_kl,
)
from understudy.losses.relations import correlation_congruence, pkt, rkd, similarity_preserving

__all__ = [
    "ContrastMemory",
    "attention_map",
    "attention_transfer",
    "class_prior",
    "class_prior_table",
    "correlation_congruence",
    "crd",
    "cross_entropy",
    "dist",
    "dkd",
    "embedding_alignment",
    "hint",
    "kl",
    "mse_logits",
    "nst",
    "pkt",
    "review",
    "rkd",
    "salient_attention",
    "similarity_preserving",
    "standardized_kl",
    "top_k_kl",
    "vid",
    "vid_variance",
]
