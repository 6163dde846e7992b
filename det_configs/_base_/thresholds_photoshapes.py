"""For PhotoShapes at 192 pixels, calibrated on the validation images without their annotations
(examples/photoshapes_results.py det) to remove 27 % of the content's tokens.

Scored by the Laplacian: entropy is low where two plain colours meet, as they do at many borders of PhotoShapes'
objects, and patches merged across a border cost precision.
"""

adaptive = dict(scorer="laplacian", thresholds={16: 0.0155, 32: 0.0046})
