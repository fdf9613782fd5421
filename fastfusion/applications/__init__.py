"""What is built on the layers: small models that train in minutes, and real checkpoints.

``python -m fastfusion train NAME`` trains the model of an application, ``python -m fastfusion demo
NAME`` shows what it does beside its twin of stock torch.nn. They need the ``demo`` extra. Each
package of `TRAINED` has `Settings`, `train`, `show`, `CHECKPOINT` (the file that ships), `PICTURE`
(the name of what `show` draws) and `example`, which makes of a checkpoint what
:func:`fastfusion.plotting.attention_page` takes: the model, inputs, the image and its words. One
that reads packages from a folder has `FOLDER`, where they lie unless `--data` names another.
"""

TRAINED = ("vqa", "retrieval", "captioning", "sentiment", "diagnosis")
