"""The lab: published experiments, run again number by number."""
