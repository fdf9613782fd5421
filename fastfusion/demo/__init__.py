"""The demo: questions about the images of easy-vqa, answered by a model that trains in minutes.

Needs the ``demo`` extra. ``python -m fastfusion demo`` runs it, ``python -m fastfusion train``
trains the model again.
"""
