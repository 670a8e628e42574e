"""Low-rank adapters (LoRA) on the linear layers of language model and vision tower: peft's layers, our arithmetic.

Shapes: T tokens, I and O features in and out, K rank.
"""

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from mmrm_fast.config import WeightsConfig
from mmrm_fast.data.packing import TokenPlan
from mmrm_fast.model.reward_model import RewardModel, ScoreHead, new_score

MAIN, PROXY = "main", "proxy"


class TwoAdapterModel(RewardModel):
    """Reward model and text-only proxy as two adapters and two score heads on one frozen language model.

    A branch's backward pass must end before the other's forward: layers recompute with the adapter of the last one.
    """

    def __init__(self, model: RewardModel):
        super().__init__(model.model, model.pixel_mean, model.pixel_std)
        self.score = model.score
        self.only_tiles = model.only_tiles
        self.proxy_score = ScoreHead(self.score.weight.shape[1], self.score.weight.dtype)

    def forward(self, plan: TokenPlan, tiles_ISSC: Tensor | None = None, *, branch: str = MAIN) -> Tensor:
        """Rewards [R] of one branch."""
        self.branch = branch
        activate(self.model.language_model, branch)
        head = self.score if branch == MAIN else self.proxy_score
        return self.read(head, plan, tiles_ISSC)

    def image_features(self, tiles_ISSC: Tensor) -> Tensor:
        """Image tokens; the proxy's white tile passes through the model's projector without training it."""
        if self.branch == MAIN:
            return self.project(self.tower_output(tiles_ISSC))
        return super().image_features(tiles_ISSC).detach()

    def heads(self) -> list[nn.Module]:
        return [self.score, self.proxy_score]


def add_lora(part: nn.Module, config: WeightsConfig, name: str) -> None:
    """Freeze a language model or vision tower and add an adapter to each linear layer of its blocks.

    That is every target of the reference implementation; query, key and value get an adapter each where it has one
    for all three. A mixture's routers and experts are no linear layers and stay frozen. Adapters are fp32.
    """
    blocks = part.encoder.layer if hasattr(part, "encoder") else part.layers
    targets = {
        key.removesuffix(".base_layer").rpartition(".")[2]
        for key, module in blocks.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in key
    }
    lora = LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=sorted(targets)
    )
    part.requires_grad_(False)
    inject_adapter_in_model(lora, part, adapter_name=name)
    for key, parameter in part.named_parameters():
        if ".lora_" in key:  # peft lets only the last adapter train
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    for module in part.modules():
        if type(module) is LoraLinear:
            module.__class__ = AdaptedLinear


class AdaptedLinear(LoraLinear):
    """peft's linear layer and its active adapter, `base(x) + scale * (dropout(x) A^T) B^T`."""

    def forward(self, x: Tensor) -> Tensor:
        (name,) = self.active_adapters
        if self.training and not isinstance(self.lora_dropout[name], nn.Identity):
            return super().forward(x)  # two inputs: nothing to share
        base, down, up = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        rows = AdaptedProduct.apply(x.flatten(0, -2), base.weight, base.bias, down, up, self.scaling[name])
        return rows.unflatten(0, x.shape[:-1])


class AdaptedProduct(torch.autograd.Function):
    """`x W^T + b + scale * (x A^T) B^T` with W and b frozen; adapters and their products in A's dtype.

    Of the tokens it saves x itself, which layers that read the same tensor share, and x A^T [T, K].
    """

    @staticmethod
    def forward(
        ctx, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_KI: Tensor, up_OK: Tensor, scale: float
    ) -> Tensor:
        low_TK = linear(x_TI.to(down_KI.dtype), down_KI)
        ctx.save_for_backward(x_TI, weight_OI, down_KI, up_OK, low_TK)
        ctx.scale = scale
        out_TO = linear(x_TI, weight_OI, bias_O)
        return torch.addmm(out_TO.to(low_TK.dtype), low_TK, up_OK.T, alpha=scale).to(out_TO.dtype)

    @staticmethod
    def backward(ctx, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI, down_KI, up_OK, low_TK = ctx.saved_tensors
        exact_TO = grad_TO.to(up_OK.dtype)
        grad_low_TK = (exact_TO @ up_OK).mul_(ctx.scale)
        grad_up_OK = (exact_TO.T @ low_TK).mul_(ctx.scale)
        grad_down_KI = grad_low_TK.T @ x_TI.to(down_KI.dtype)
        grad_TI = None
        if ctx.needs_input_grad[0]:
            grad_TI = (grad_TO @ weight_OI).to(down_KI.dtype).addmm_(grad_low_TK, down_KI).to(x_TI.dtype)
        return grad_TI, None, None, grad_down_KI, grad_up_OK, None


def is_stored(name: str) -> bool:
    """Whether a parameter of a model with adapters is one of the folder that it begins from."""
    return ".lora_" not in name and not name.startswith("proxy_score.")


def begun(name: str, shape: tuple[int, ...]) -> Tensor:
    """What a parameter that is in no folder begins with, whole: peft's adapters, which change nothing, or a score."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    return (
        torch.empty(shape).uniform_(-(shape[1] ** -0.5), shape[1] ** -0.5)
        if ".lora_A." in name
        else new_score(shape[1])
    )


def activate(language_model: nn.Module, name: str) -> None:
    """Compute with one adapter (peft's own `set_adapter` would also freeze the others)."""
    for module in language_model.modules():
        if isinstance(module, LoraLayer):
            module._active_adapter = [name]


def merged(state: dict[str, Tensor], name: str, scale: float) -> dict[str, Tensor]:
    """Whole weights, by name, of a plain model: one adapter added in, W + scale * B A, in fp32, the others left out.

    `scale` is `lora_alpha / lora_r`; weights without an adapter are passed on.
    """
    plain = {}
    for key, value in state.items():
        if ".lora_" in key:
            continue
        layer, found, rest = key.partition(".base_layer.")
        down = state.get(f"{layer}.lora_A.{name}.weight")
        if found and rest == "weight" and down is not None:
            up = state[f"{layer}.lora_B.{name}.weight"]
            value = torch.addmm(value.float(), up.float(), down.float(), alpha=scale)
        plain[f"{layer}.{rest}" if found else key] = value
    return plain
