"""Run every graph of a folder on images.npy and write its logits to GRAPH.npy.

It needs only NumPy and a runtime, so that an emulated processor can run it:

    python run_graphs.py FOLDER onnxruntime|openvino [PACKAGES]
"""

import sys
from pathlib import Path


def main(folder, runtime, *packages):
    sys.path[:0] = packages
    import numpy as np

    images = np.load(folder / "images.npy")
    for path in sorted(folder.glob("*.onnx")):
        if runtime == "onnxruntime":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 4
            run = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            ).run
            logits = np.concatenate([run(None, {"images": part})[0] for part in batches(images)])
        else:
            import openvino

            model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": 1})
            logits = np.concatenate([model({"images": part})[0] for part in batches(images)])
        np.save(path.with_suffix(f".{runtime}.npy"), logits)


def batches(images):
    return [images[i : i + 60] for i in range(0, len(images), 60)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
