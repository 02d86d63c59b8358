"""Adapters of an SDXL pipeline, LoRA and DoRA: of a U-Net and two text encoders.

    python tests/golden/check_pipeline.py diffusers DIR  # torch, peft, diffusers
    python -m tests.golden.check_pipeline jlora DIR      # reads each part, writes all
    python tests/golden/check_pipeline.py diffusers DIR  # loads what jlora wrote

diffusers and transformers run as they are, on tiny models with SDXL's own modules. The
first time they make adapters and merge them; the second time they load jlora's, in
their format and (LoRA) in kohya's. jlora reads the first text encoder under the names
that transformers 5 saves, and under those that it has on the Hub (`text_model.`). Each
step exits with 1 where a merged weight differs by more than a part in 1e6 of its
largest entry.

The first step needs transformers 5.23, or PEFT 0.22: with PEFT 0.21, 5.24 makes no
adapter. The last step ran with 5.23 and 5.24.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from tests.golden.arrays import compare, load, save

COMPONENTS = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}
AIMS = {
    "unet": ["to_q", "to_v", "to_out.0", "proj_in", "conv1", "conv_shortcut", "conv"],
    "text_encoder": ["q_proj", "out_proj", "fc1"],
    "text_encoder_2": ["q_proj", "v_proj", "out_proj", "fc2"],
}
KINDS = ("lora", "dora")


def pipeline():
    import torch
    from diffusers import (
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
    )

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
        down_block_types=(
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
        ),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=8,
    )
    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
    )


def merged(model) -> dict:
    """Returns the weights of a model of torch's with PEFT's adapters merged in."""
    from peft.tuners.lora import LoraLayer

    out = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            module.merge()
            weight = module.get_base_layer().weight.detach().numpy().copy()
            out[f"{name.removeprefix('text_model.')}.weight"] = weight
    return out


def make(folder: pathlib.Path) -> None:
    """Writes the models, and for each kind one file for all three."""
    import torch
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    for kind in KINDS:
        pipe, states = pipeline(), {}
        for i, component in enumerate(COMPONENTS):
            model = getattr(pipe, component)
            model.save_pretrained(str(folder / component))
            config = LoraConfig(
                r=3 + i,
                lora_alpha=5 + i,
                target_modules=AIMS[component],
                use_dora=kind == "dora",
            )
            model.add_adapter(config)
            for name, x in model.named_parameters():
                if "magnitude" in name:
                    x.data *= 1 + torch.rand_like(x)
                elif "lora_" in name:
                    torch.nn.init.normal_(x, std=0.2)
            state = get_peft_model_state_dict(model)
            states[f"{component}_lora_layers"] = convert_state_dict_to_diffusers(state)
        about = _collate_lora_metadata({c: getattr(pipe, c) for c in COMPONENTS})
        pipe.save_lora_weights(str(folder / kind), **states, **about)
        for component in COMPONENTS:
            wanted = folder / f"{kind}_{component}.safetensors"
            save(merged(getattr(pipe, component)), wanted)


def diffusers(folder: pathlib.Path) -> int:
    if not (folder / "dora_unet.safetensors").exists():
        make(folder)
        return 0
    bad = 0
    for own in sorted(folder.glob("own_*")):
        pipe = pipeline()
        (file,) = own.glob("*.safetensors")
        pipe.load_lora_weights(str(own), weight_name=file.name)
        kind = "dora" if "dora" in own.name else "lora"
        for component in COMPONENTS:
            wanted = load(folder / f"{kind}_{component}.safetensors")
            found = merged(getattr(pipe, component))
            bad |= compare(f"diffusers loads {own.name}, {component}", found, wanted)
    return bad


def own(folder: pathlib.Path) -> int:
    bad = 0
    for component in COMPONENTS:
        (file,) = (folder / component).glob("*.safetensors")
        params = load(file)
        hub = {f"text_model.{n}" if n.startswith("enc") else n: x
               for n, x in params.items()}  # fmt: skip
        for names, base in (("new", params), ("hub", hub)):
            (folder / "bases").mkdir(exist_ok=True)
            save(base, folder / "bases" / f"{names}_{component}.safetensors")
    for kind in KINDS:
        for names in ("new", "hub"):
            bad |= convert(folder, kind, names)
    return bad


def convert(folder: pathlib.Path, kind: str, names: str) -> int:
    """Reads each part of a file, and adds it to a file of each format."""
    import jlora

    bad = 0
    for component, te in COMPONENTS.items():
        base = folder / "bases" / f"{names}_{component}.safetensors"
        read = jlora.files.read(folder / kind, base=base, component=component)
        params = load(base)
        after = jlora.merge({n: params[n] for n in read.lora}, read)
        after = {n.removeprefix("text_model."): x for n, x in after.items()}
        wanted = load(folder / f"{kind}_{component}.safetensors")
        bad |= compare(f"jlora reads {kind} of {component}, {names}", after, wanted)
        options = {"diffusers": component}
        if kind == "lora":
            options["kohya-sdxl" if te == "unet" else "kohya"] = te
        for dialect, name in options.items():
            whose = kind if dialect == "diffusers" else "kohya"
            own = folder / f"own_{whose}_{names}"
            jlora.peft.save(own, read, dialect=dialect, component=name, add=True)
            again = jlora.files.read(own, base=base, component=name)
            after = jlora.merge({n: params[n] for n in read.lora}, again)
            after = {n.removeprefix("text_model."): x for n, x in after.items()}
            bad |= compare(f"jlora reads its own {dialect}", after, wanted)
    return bad


if __name__ == "__main__":
    steps = {"diffusers": diffusers, "jlora": own}
    sys.exit(steps[sys.argv[1]](pathlib.Path(sys.argv[2])))
