"""Train and run multimodal reward models that do not fall for text-only shortcuts."""

__version__ = "0.1.0"
__all__ = ["Scorer"]


def __getattr__(name: str):
    """Import `Scorer`, and with it torch, when it is first asked for."""
    if name == "Scorer":
        from mmrm_fast.score.scorer import Scorer

        return Scorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
