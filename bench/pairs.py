#!/usr/bin/env python3
"""Makes an edge model out of a cloud model, for pairs to calibrate and evaluate: any GGUF of a Llama-like model
(tensors blk.N.*, output_norm, and output or tied weights).

    bench/pairs.py layers  IN.gguf OUT.gguf --keep K   # its first K layers, under its own norm and head
    bench/pairs.py coarser IN.gguf OUT.gguf --bits B   # all layers, their matrices rounded to B bits (2, 3 or 4)

The first kind shares its leading layers with the cloud model bit for bit (a trunk), the second shares none. Rounding
is to 2^B levels from the least to the largest of 32 weights; the file holds them as Q4_1, so it is no smaller, only
coarser. How often the two models agree: `tandem lab eval`. Needs numpy and gguf (bench/llama-peer/requirements.txt)."""
import argparse, re
import gguf, numpy as np
from gguf import GGMLQuantizationType as Type, GGUFValueType as Value

BLOCK = 32


def copy_fields(reader, writer, arch, layers):
    """All keys of the file; those that count or list layers for `layers` of them."""
    before = reader.fields[f"{arch}.block_count"].contents()
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value, kind = field.contents(), field.types[0]
        sub = field.types[-1] if kind == Value.ARRAY else None
        if name == f"{arch}.block_count":
            value = layers
        elif kind == Value.ARRAY and name.startswith(f"{arch}.") and len(value) == before:
            value = value[:layers]
        elif name == "general.name":
            value = f"{value} ({writer.note})"
        writer.add_key_value(name, value, kind, sub)


def coarser(values, bits):
    """`values` as Q4_1 blocks that use 2^bits of their 16 codes."""
    blocks = values.astype(np.float32).reshape(-1, BLOCK)
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    low16, step16 = low.astype(np.float16), ((high - low) / (2**bits - 1)).astype(np.float16)
    step = step16.astype(np.float32)
    codes = np.where(step > 0, (blocks - low16.astype(np.float32)) / np.where(step > 0, step, 1), 0)
    codes = np.clip(np.rint(codes), 0, 2**bits - 1).astype(np.uint8)
    packed = codes[:, : BLOCK // 2] | codes[:, BLOCK // 2 :] << 4
    return np.concatenate([step16.view(np.uint8), low16.view(np.uint8), packed], axis=1).reshape(*values.shape[:-1], -1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["layers", "coarser"])
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--keep", type=int, help="layers to keep")
    parser.add_argument("--bits", type=int, choices=[2, 3, 4], help="bits of a weight")
    a = parser.parse_args()
    if (a.kind == "layers") != (a.keep is not None) or (a.kind == "coarser") != (a.bits is not None):
        parser.error("`layers` takes --keep, `coarser` takes --bits")
    reader = gguf.GGUFReader(a.input)
    arch = reader.fields["general.architecture"].contents()
    layers = reader.fields[f"{arch}.block_count"].contents()
    keep = layers if a.keep is None else a.keep
    if not 1 <= keep <= layers:
        parser.error(f"--keep is {keep}, the model has {layers} layers")
    writer = gguf.GGUFWriter(a.output, arch)
    writer.note = f"first {keep} layers" if a.bits is None else f"{a.bits} bits"
    copy_fields(reader, writer, arch, keep)
    for tensor in reader.tensors:
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        if layer and int(layer[1]) >= keep:
            continue
        data, type = tensor.data, tensor.tensor_type
        # `shape` is innermost first.
        if a.bits and layer and len(tensor.shape) > 1 and tensor.shape[0] % BLOCK == 0:
            data, type = coarser(gguf.quants.dequantize(data, type), a.bits), Type.Q4_1
        writer.add_tensor(tensor.name, data, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
