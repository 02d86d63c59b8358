"""Hugging Face PEFT on PyTorch, eager, on CPU.

`peer_peft_compiled.py` runs the same under `torch.compile`.
"""

import common
import peft
import torch
from torch import nn
from torch.nn import functional


class Layer(nn.Module):
    """The weights of one block."""

    def __init__(self, own: common.Tree):
        super().__init__()
        for name, value in own.items():
            if name in common.MATRICES:
                linear = nn.Linear(*value.shape, bias=False)
                linear.weight.data = torch.tensor(value.T.copy())
                setattr(self, name, linear)
            else:
                setattr(self, name, nn.Parameter(torch.tensor(value)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the block's output, `[batch, t, d]`."""
        y = rms_norm(x, self.norm1)
        heads = (x.shape[0], x.shape[1], -1, common.HEAD)
        q, k, v = (
            own(y).view(heads).transpose(1, 2) for own in (self.q, self.k, self.v)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(x.shape))
        y = self.w1(rms_norm(x, self.norm2))
        return x + self.w2(functional.gelu(y, approximate="tanh"))


class Decoder(nn.Module):
    """The shared model with the shared weights."""

    def __init__(self, problem: common.Problem):
        super().__init__()
        weights = problem.weights()
        self.embed = nn.Parameter(torch.tensor(weights["embed"]))
        self.position = nn.Parameter(torch.tensor(weights["position"]))
        self.norm = nn.Parameter(torch.tensor(weights["norm"]))
        for i in range(problem.layers):
            setattr(self, f"layer{i}", Layer(weights[f"layer{i}"]))
        self.depth = problem.layers

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the logits."""
        x = functional.embedding(tokens, self.embed) + self.position[: tokens.shape[1]]
        for i in range(self.depth):
            x = getattr(self, f"layer{i}")(x)
        return functional.linear(rms_norm(x, self.norm), self.embed)


def rms_norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Returns `x` over its root mean square, times `gain`."""
    return functional.rms_norm(x, (x.shape[-1],), gain, common.EPSILON)


def run(compiled: bool = False) -> None:
    """Trains the adapted model and prints the figures."""
    problem = common.read_flags()
    config = peft.LoraConfig(
        r=problem.rank,
        lora_alpha=problem.rank,
        lora_dropout=0.0,
        target_modules=list(common.MATRICES),
    )
    model = peft.get_peft_model(Decoder(problem), config)
    factors = problem.factors()
    trained = []
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = common.find_factor(factors, path.removesuffix(".default.weight"))
            parameter.data = torch.tensor(value.T.copy())
            trained.append(parameter)
    optimizer = torch.optim.AdamW(
        trained,
        lr=common.ADAMW["learning_rate"],
        betas=(common.ADAMW["b1"], common.ADAMW["b2"]),
        eps=common.ADAMW["eps"],
        weight_decay=common.WEIGHT_DECAY,
    )

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    forward = torch.compile(loss_of) if compiled else loss_of

    def step(tokens: torch.Tensor) -> float:
        loss = forward(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    batches = list(torch.tensor(problem.tokens(), dtype=torch.int64))
    figures = common.measure(step, batches, problem.steps)
    common.report(("peft", "torch"), figures)


if __name__ == "__main__":
    run()
