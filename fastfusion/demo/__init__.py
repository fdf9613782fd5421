"""The demo: questions about the images of easy-vqa, answered by a model that trains in minutes.

Needs the ``demo`` extra. Run it with ``python -m fastfusion demo``, retrain it with ``python -m fastfusion train``.
"""
