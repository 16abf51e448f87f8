"""Names the likeliest classes: python run.py PICTURE ... (numpy, pillow, onnxruntime)."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main() -> None:
    folder = Path(__file__).resolve().parent
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    rows = {f"{row['target']}-{row['precision']}": row for row in manifest["artifacts"]}
    rows = {manifest["default_artifact"]: rows[manifest["default_artifact"]], **rows}
    row = next(row for row in rows.values() if row["target"] == "onnx")
    channels, height, width = manifest["preprocessing"]["image_shape"]
    stretched = manifest["preprocessing"]["resize"] == "stretch"
    session = onnxruntime.InferenceSession(str(folder / row["folder"] / row["opens"]))
    for name in sys.argv[1:]:
        image = ImageOps.exif_transpose(Image.open(name))
        if image.mode.startswith("I"):  # 16 bits
            values_HW = np.asarray(image).astype(np.int64).clip(0, 65535)
            image = Image.fromarray(((values_HW + 128) // 257).astype(np.uint8))
        elif image.has_transparency_data:
            black = Image.new("RGBA", image.size, (0, 0, 0, 255))
            image = Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
        image = image.convert("RGB" if channels == 3 else "L")
        resize = Image.Image.resize if stretched else ImageOps.fit
        if image.size != (width, height):
            image = resize(image, (width, height), Image.Resampling.BILINEAR)
        pixels_HWC = np.asarray(image, np.float32).reshape(height, width, channels) / np.float32(
            255
        )
        images_NCHW = np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)[None])
        logits_K = session.run(None, {session.get_inputs()[0].name: images_NCHW})[0][0]
        shares_K = np.exp(logits_K - logits_K.max()) / np.exp(logits_K - logits_K.max()).sum()
        best = np.argsort(-logits_K, kind="stable")[:3]
        print(
            f"{name}:", ", ".join(f"{manifest['class_names'][k]} {shares_K[k]:.1%}" for k in best)
        )


main()
