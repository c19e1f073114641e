"""Names of the authors' network beside ours, and the fill rule with which their reference outputs were made."""

import zlib

import numpy as np
import torch

from models.baryir import BaryIR

# Prefixes of our parameter names -> those in the authors' state dict (their `barylatent` is the map T).
STAGES = {
    "patch_embed": "patch_embed.proj",
    "encoder.0": "encoder_level1", "encoder.1": "encoder_level2", "encoder.2": "encoder_level3",
    "down.0.0": "down1_2.body.0", "down.1.0": "down2_3.body.0", "down.2.0": "down3_4.body.0",
    "latent": "latent", "latent_norm": "LN.body", "transport_map": "barylatent",
    "fuse.0.0": "noise_level3", "fuse.1": "reduce_noise_level3", "residual_in": "resreduce_noise_level3",
    "up.2.0": "up4_3.body.0", "up.1.0": "up3_2.body.0", "up.0.0": "up2_1.body.0",
    "residual_up.2.0": "resup4_3.body.0", "residual_up.1.0": "resup3_2.body.0", "residual_up.0.0": "resup2_1.body.0",
    "reduce.2": "reduce_chan_level3", "reduce.1": "reduce_chan_level2",
    "decoder.2": "decoder_level3", "decoder.1": "decoder_level2", "decoder.0": "decoder_level1",
    "bridge.1.0.0": "noise_level2", "bridge.1.1": "reduce_noise_level2",
    "bridge.0.0.0": "noise_level1", "bridge.0.1": "reduce_noise_level1",
    "residual_reduce.1": "resreduce_chan_level3", "residual_reduce.0": "resreduce_chan_level2",
    "residual_decoder.1": "resdecoder_level3", "residual_decoder.0": "resdecoder_level2",
    "residual_bridge.1": "resreduce_noise_level2", "residual_bridge.0": "resreduce_noise_level1",
    "refinement": "refinement", "output": "output",
}
# Inside a transformer block.
PARTS = {
    "norm1": "norm1.body", "norm2": "norm2.body",
    "attention.temperature": "attn.temperature", "attention.qkv": "attn.qkv",
    "attention.qkv_depthwise": "attn.qkv_dwconv", "attention.project_out": "attn.project_out",
    "feed_forward.project_in": "ffn.project_in", "feed_forward.depthwise": "ffn.dwconv",
    "feed_forward.project_out": "ffn.project_out",
}

# 1x1 convolutions of their state dict that their network never uses.
UNUSED = tuple(f"{layer}.weight" for layer in ("chnl_reduce1", "chnl_reduce2", "chnl_reduce3",
                                              "reduce_noise_channel_1", "reduce_noise_channel_2", "reduce_noise_channel_3"))


def official_name(name: str) -> str:
    """Our parameter name (`encoder.0.1.attention.qkv.weight`) -> the authors' (`encoder_level1.1.attn.qkv.weight`)."""
    stage = max((s for s in STAGES if name.startswith(s + ".")), key=len)
    rest = name[len(stage):]
    for ours, theirs in PARTS.items():
        head, part, tail = rest.partition("." + ours)
        if part and (not tail or tail in (".weight", ".bias")):
            rest = f"{head}.{theirs}{tail}"
            break
    return STAGES[stage] + rest


@torch.no_grad()
def fill_reference(net: BaryIR) -> None:
    """Fill every parameter from its official name, by the rule with which the authors' network was measured.

    v = N(0, 1) seeded by the CRC-32 of the name; 1 + 0.1 v for temperatures and 1-d weights, 0.1 v for other 1-d
    parameters, else v / sqrt(fan-in).
    """
    for name, parameter in net.named_parameters():
        name = official_name(name)
        v = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(parameter.shape))
        if name.endswith(".temperature") or (v.ndim == 1 and name.endswith(".weight")):
            v = 1 + 0.1 * v
        elif v.ndim == 1:
            v = 0.1 * v
        else:
            v = v / np.sqrt(np.prod(v.shape[1:]))
        parameter.copy_(torch.from_numpy(v.astype(np.float32)))
