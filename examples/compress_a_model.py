"""The whole job on an embedded model, in a minute or so: a smaller network, its files, a report and a bundle."""

import sys

import compressor

out = sys.argv[1] if len(sys.argv) > 1 else "runs/example"
run = compressor.compress(
    "digits-resnet",
    budget="macs 0.6",
    calibration=256,
    finetune_epochs=0,  # repaired in closed form, nothing trained
    targets=(),  # no engines
    latency_seconds=0.2,
    out=out,
)
print(f"top-1 {run.summary['accuracy_dense']:.2%} before, {run.summary['accuracy_shipped']:.2%} after")
print(f"MACs  {run.summary['macs_dense']:,} before, {run.summary['macs_shipped']:,} after")
print("report:", run.folder / "report.html")
