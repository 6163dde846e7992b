"""For PhotoShapes at 160 pixels; examples/photoshapes_results.py seg calibrates its own to a token budget.

Scored by the Laplacian: entropy is low where two plain colours meet, as they do at many borders of PhotoShapes'
objects, and a patch merged across a border blurs it.
"""

adaptive = dict(scorer="laplacian", thresholds={8: 0.02})
