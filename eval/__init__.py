"""Scorers, one file for each family of metrics: records and predictions in, numbers out.

They know no Ray, no model and no files. The shapes of predictions are few:

- boxes: record key -> `ScoredBoxes` or the model's `Detection`. Every record needs an entry, an
  empty one where nothing was found: what was never looked at is a DataError, not a miss.
- masks of boxes: `ScoredBoxes.masks`, COCO's compressed run lengths {"size": [h, w], "counts": str}
- one mask for a text: record key -> run lengths
- answers: question id -> text; captions: record key -> text

A prediction with a NaN or infinite number is dropped, and the result says how many were. Results
are dataclasses whose `to_dict()` gives flat, named floats; what is undefined, as an average over
nothing, is not in it. All are shares in [0, 1], except CIDEr-D, which reaches 10.
"""
