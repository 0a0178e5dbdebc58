"""Head profiles: the file format, reading and writing, published formats, look-up, plots."""

from rlkv_vllm.profile.schema import EvaluationRow, HeadProfile, ModelFingerprint, Provenance

__all__ = ["EvaluationRow", "HeadProfile", "ModelFingerprint", "Provenance"]
