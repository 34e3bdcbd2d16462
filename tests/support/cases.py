"""Inputs shared by the operator tests: those of `python -m iprm_kernels verify`."""

from iprm_kernels.verify.inputs import DTYPES, feature_pairs, logit_pairs, randn

__all__ = ["DTYPES", "feature_pairs", "logit_pairs", "randn"]
