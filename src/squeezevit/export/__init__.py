"""Out of torch: a model as ONNX, OpenVINO, a torch.export program or an AOTInductor package, verified before it is written.

`sv.export` is `squeezevit.export.job.export`.
"""
