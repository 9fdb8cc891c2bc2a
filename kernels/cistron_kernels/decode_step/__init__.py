"""One token through a Hyena operator's state."""

from cistron_kernels.decode_step.reference import fir_step, modal_step

__all__ = ["fir_step", "modal_step"]
