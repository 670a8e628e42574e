"""Mixtures of experts: the share of them that a token passes through, and the loss that balances their use.

Routing is by token, so packed tokens go through the experts that padded ones go through; what computes them is
transformers' `grouped_mm`: two matrix products over all experts for tokens sorted by expert, with no look at the device
in between, where `eager` waits for it expert by expert and `batched_mm` copies an expert's weights for every token.

Shapes: T routed tokens, E experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

EXPERTS = ".experts."  # in the names of their weights


def num_experts(model: nn.Module) -> int:
    """Experts of a layer of a reward model; 0 where it has none."""
    named = model.model.language_model.named_parameters()
    return next((len(parameter) for name, parameter in named if EXPERTS in name and parameter.ndim == 3), 0)


def experts_of_a_token(model: nn.Module) -> int:
    """Experts of a layer that a token passes through, by the names that configs have for it."""
    config = model.model.config.text_config
    return getattr(config, "num_experts_per_tok", None) or config.moe_topk


def expert_share(model: nn.Module) -> float:
    """The share of its experts that a token passes through; 1 where there are none."""
    return experts_of_a_token(model) / num_experts(model) if num_experts(model) else 1.0


def active_parameters(model: nn.Module) -> int:
    """Parameters of a reward model that one token passes through."""
    share = expert_share(model)
    return round(sum(p.numel() * (share if EXPERTS in name else 1) for name, p in model.named_parameters()))


@contextmanager
def routing(language_model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The router logits [T, E] of the forward passes inside, layer by layer; empty where no layer has a router.

    A last layer that computes the tokens that are read alone routes no others.
    """
    recorder = (language_model._can_record_outputs or {}).get("router_logits")
    routers = [module for module in language_model.modules() if recorder and isinstance(module, recorder.target_class)]
    logits: list[Tensor] = []

    def keep(router: nn.Module, args: tuple, output: tuple[Tensor, ...]) -> None:
        logits.append(output[recorder.index])

    hooks = [router.register_forward_hook(keep) for router in routers]
    try:
        yield logits
    finally:  # a block that is computed again for its gradients is not heard again
        for hook in hooks:
            hook.remove()


def balance_loss(logits: Sequence[Tensor], top_k: int) -> Tensor:
    """`E sum_e f_e p_e` over all tokens of all layers: top_k for even use of all experts, E at worst.

    f_e is the number of tokens a token that have e among their `top_k` experts, p_e the mean of its probability, which
    alone has a gradient. Source: Fedus et al., Switch Transformers, arXiv 2101.03961, equations 4 to 6, over top_k
    experts as transformers' `load_balancing_loss_func` has it. Computed in float32 at least.
    """
    counts_E = probabilities_E = torch.zeros(logits[0].shape[-1], device=logits[0].device)
    for logits_TE in logits:
        weights_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)).softmax(-1)
        chosen = weights_TE.topk(top_k).indices.flatten()
        counts_E = counts_E.scatter_add(0, chosen, torch.ones_like(chosen, dtype=counts_E.dtype))
        probabilities_E = probabilities_E + weights_TE.sum(0)
    rows = max(sum(map(len, logits)), 1)
    return len(counts_E) * (counts_E / rows) @ (probabilities_E / rows)
