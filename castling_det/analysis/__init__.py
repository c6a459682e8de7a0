"""Numbers about detectors and pages made of them.

- `complexity`: parameters and multiply-adds in closed form.
- `record`: the typed records that every table, plot and page is rendered from.
- `benchmark`: latency and peak memory of the attention against fused softmax, with a parity gate.
- `work_dir`: reads what MMDetection's train and test tools leave behind.
- `matching`: which detections of an image are right at a stated score and IoU.
- `report`: builds a report from work dirs and renders it as JSON, Markdown and HTML.
"""
