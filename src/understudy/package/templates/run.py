"""Names the likeliest classes: python run.py PICTURE ... (numpy, pillow, onnxruntime)."""

import hashlib
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

Image.MAX_IMAGE_PIXELS = 50_000_000
warnings.simplefilter("error", Image.DecompressionBombWarning)
given, folder = "the package", Path(__file__).resolve().parent
try:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    rows = [row for row in manifest["artifacts"] if row["target"] == "onnx"]
    row = max(rows, key=lambda row: row["folder"].endswith("/" + manifest["default_artifact"]))
    name = f"{row['folder']}/{row['opens']}"
    model = (folder / name).read_bytes()
    if hashlib.sha256(model).hexdigest() != manifest["files"][name]["sha256"]:
        raise ValueError(f"{name} was changed; get the package again")
    session = onnxruntime.InferenceSession(model)
    channels, height, width = manifest["preprocessing"]["image_shape"]
    mode, entry = "RGB" if channels == 3 else "L", session.get_inputs()[0].name
    stretched = manifest["preprocessing"]["resize"] == "stretch"
    resize = Image.Image.resize if stretched else ImageOps.fit  # the right size stays as it is
    for given in sys.argv[1:]:
        image = ImageOps.exif_transpose(Image.open(given))
        if image.mode.startswith("I"):  # 16 bits
            values = np.asarray(image).astype(np.int64).clip(0, 65535)
            image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        elif image.has_transparency_data:
            black = Image.new("RGBA", image.size, "black")
            image = Image.alpha_composite(black, image.convert("RGBA"))
        image = resize(image.convert(mode), (width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image, np.float32).reshape(1, height, width, channels) / 255
        logits = session.run(None, {entry: pixels.transpose(0, 3, 1, 2)})[0][0]
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        best = [(manifest["class_names"][k], shares[k]) for k in np.argsort(-logits, kind="stable")]
        print(f"{given}:", ", ".join(f"{name} {share:.1%}" for name, share in best[:3]))
except Exception as error:  # decoders raise nearly everything on damaged bytes
    print(f"{given} cannot be used:", *(str(error) or repr(error)).split(), file=sys.stderr)
    sys.exit(2)
