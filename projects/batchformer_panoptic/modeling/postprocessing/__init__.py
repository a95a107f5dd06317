"""From predictions to results: masks at the output size, panoptic inference, detections."""
