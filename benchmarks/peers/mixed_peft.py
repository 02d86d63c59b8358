"""How does PEFT's mixed batch, a loop over adapters, grow with their number?

Run in the environment that `python -m benchmarks.peers` made for PEFT. The model has
the size of that in the serving part of `benchmarks.adapters`; only the forward pass.
"""

import statistics
import time
from collections.abc import Callable

import common
import peft
import torch
from peer_peft import Decoder

ROWS, ROUNDS = 32, 15


def config(rank: int) -> peft.LoraConfig:
    """Returns LoRA on all matrices of the decoder."""
    return peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(common.MATRICES)
    )


def main() -> None:
    """Prints the time of a batch by the number of its adapters."""
    for width, length in ((256, 32), (512, 32), (512, 1)):
        problem = common.Problem(width=width, batch=ROWS, length=length)
        tokens = torch.tensor(problem.tokens()[0][:, :length], dtype=torch.int64)
        base = Decoder(problem)
        model = peft.get_peft_model(Decoder(problem), config(problem.rank), "0")
        for i in range(1, ROWS):
            model.add_adapter(str(i), config(problem.rank))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        model.set_adapter("0")
        model.eval()
        runs: dict[str, Callable[[], torch.Tensor]] = {
            "merged": lambda base=base, tokens=tokens: base(tokens),
            "one shared": lambda model=model, tokens=tokens: model(tokens),
        }
        for n in (1, 4, 32):
            names = [str(i % n) for i in range(ROWS)]
            runs[f"{n} in rows"] = lambda model=model, tokens=tokens, names=names: (
                model(tokens, adapter_names=names)
            )
        times: dict[str, list[float]] = {name: [] for name in runs}
        with torch.inference_mode():
            for i in range(ROUNDS + 3):
                for name, run in runs.items():
                    start = time.perf_counter()
                    run()
                    if i >= 3:
                        times[name].append(time.perf_counter() - start)
        shared = statistics.median(times["one shared"])
        shown = ", ".join(
            f"{name} {1e3 * statistics.median(own):.1f} ms "
            f"({statistics.median(own) / shared:.2f})"
            for name, own in times.items()
        )
        print(f"width {width}, {ROWS} x {length} tokens: {shown}", flush=True)


if __name__ == "__main__":
    main()
