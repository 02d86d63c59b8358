"""What kohya's scripts call the modules of SDXL's U-Net: as Stability's own code does.

Torch models of the Hub have diffusers' names for them. The rules are those of diffusers
0.42.1, loaders/lora_conversion_utils.py (`_maybe_map_sgm_blocks_to_diffusers`,
`_convert_unet_lora_key`) and of kohya's library/sdxl_model_util.py
(`make_unet_conversion_map`), which has those outside the blocks too.
"""

_RESNET = {  # modules of a `ResnetBlock2D` that have a matrix or a kernel
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {  # of the blocks
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def _blocks() -> dict[str, str]:
    """Returns Stability's name of each ResNet, transformer and sampler."""
    out = {f"mid_block.resnets.{j}": f"middle_block.{2 * j}" for j in range(2)}
    out["mid_block.attentions.0"] = "middle_block.1"
    down = ("down_blocks", "input_blocks", 1, 2)  # diffusers', Stability's, first, many
    up = ("up_blocks", "output_blocks", 0, 3)
    for i in range(3):
        for theirs, own, first, count in (down, up):
            for j in range(count):
                block = f"{own}.{3 * i + j + first}"
                out[f"{theirs}.{i}.resnets.{j}"] = f"{block}.0"
                out[f"{theirs}.{i}.attentions.{j}"] = f"{block}.1"
        out[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{3 * i + 3}.0.op"
        out[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{3 * i + 2}.2.conv"
    return out


_BLOCKS = _blocks()


def stability_name(module: str) -> str | None:
    """Returns Stability's name of a module of diffusers' SDXL; None if it has none.

    Examples:
      >>> stability_name("down_blocks.1.attentions.0.proj_in")
      'input_blocks.4.1.proj_in'
      >>> stability_name("up_blocks.2.resnets.0.time_emb_proj")
      'output_blocks.6.0.emb_layers.1'
    """
    whole = _OUTSIDE.get(module) or _BLOCKS.get(module)
    if whole:
        return whole
    parts = module.split(".")
    n = 3 if parts[0] == "mid_block" else 4
    block, rest = _BLOCKS.get(".".join(parts[:n])), ".".join(parts[n:])
    if parts[n - 2 : n - 1] == ["resnets"]:
        rest = _RESNET.get(rest, "")
    return f"{block}.{rest}" if block and rest else None
