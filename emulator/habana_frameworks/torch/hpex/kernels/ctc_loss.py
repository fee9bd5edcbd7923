import torch
from torch.nn import functional

from habana_frameworks.emulator.autocast import as_one_kernel
from habana_frameworks.emulator.placement import require_card


class CTCLoss:
    @staticmethod
    @as_one_kernel
    def apply(
        log_probs: torch.Tensor,
        targets: torch.Tensor,
        input_lengths: torch.Tensor,
        target_lengths: torch.Tensor,
        blank: int = 0,
        reduction: str = "mean",
        zero_infinity: bool = False,
        /,
    ) -> torch.Tensor:
        """`torch.nn.functional.ctc_loss`."""
        require_card("CTCLoss", log_probs, targets, input_lengths, target_lengths)
        return functional.ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity)
