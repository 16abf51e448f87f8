"""Distillation losses: pure functions of (student, teacher, ...)."""

from understudy.losses.logits import cross_entropy, kl

__all__ = ["cross_entropy", "kl"]
