"""Every configuration key that this project adds to Detectron2's defaults."""

import functools

import torch
from detectron2.config import CfgNode as CN


def add_batchformer_panoptic_config(cfg: CN) -> None:
    """Add this project's keys, with defaults that run, to a Detectron2 config in place.

    Detectron2's keys are reused where they mean the same: ``MODEL.MASK_ON`` builds the panoptic
    mask head, and ``MODEL.WEIGHTS``, ``SOLVER.*``, ``INPUT.*`` and ``TEST.*`` work as usual.
    """
    _add_data_keys(cfg)
    _add_image_folder_keys(cfg)
    _add_model_keys(cfg)
    _add_backbone_keys(cfg)
    _add_detr_keys(cfg)
    _add_transformer_keys(cfg)
    _add_mask2former_keys(cfg)
    _add_head_keys(cfg)
    _add_panoptic_keys(cfg)
    _add_batchformer_keys(cfg)
    _add_classifier_keys(cfg)
    _add_solver_keys(cfg)
    _add_test_keys(cfg)
    # Where metrics go besides the console and metrics.json: any of "tensorboard", "wandb" (Weights
    # & Biases) and "mlflow". The last two read their own environment variables.
    cfg.LOGGERS = ["tensorboard"]


def classifies(cfg: CN) -> bool:
    """Whether the config describes an image classifier, not a detector."""
    return bool(cfg.MODEL.META_ARCHITECTURE == "ImageClassifier")


# Settings that need masks, and their values without.
_BOXES_ONLY = {
    "MODEL.MASK_HEAD.FREEZE_DETR": False,
    "MODEL.SEMANTIC_AUX.ENABLED": False,
    "MODEL.PANOPTIC.SEMANTIC_TEST": False,
    "MODEL.PANOPTIC.INSTANCE_SCORING_TEST": "detr",
}


def boxes_only_changes(cfg: CN) -> list[str]:
    """Return ``KEY VALUE`` for each setting that has to change with ``MODEL.MASK_ON False``."""
    return [
        f"{key} {value}"
        for key, value in _BOXES_ONLY.items()
        if functools.reduce(getattr, key.split("."), cfg) != value
    ]


def _add_data_keys(cfg: CN) -> None:
    # Images with more pixels are refused before they are decoded. At most 178 956 970.
    cfg.INPUT.MAX_PIXELS = 89_478_485
    # Custom panoptic data sets: a list of [name, image_root, panoptic_root, panoptic_json]. Things
    # and stuff, class names, colours and the number of classes come from the JSON's "categories".
    cfg.DATASETS.CUSTOM_PANOPTIC = []
    # Custom data sets of boxes: a list of [name, image_root, instances_json]. Every class is a
    # thing.
    cfg.DATASETS.CUSTOM_INSTANCES = []
    # Check the data sets before a run, as tools/check_dataset.py does: the JSON and all files, of
    # which 200 million pixels per data set are decoded. Unchanged data sets are checked once.
    cfg.DATASETS.CHECK = True

    # DETR's augmentation. With probability 0.5 an image is first resized to a short side from
    # MIN_SIZES and cropped, both sides drawn from CROP_RANGE. All images are then resized to
    # INPUT.MIN_SIZE_TRAIN.
    cfg.INPUT.RESIZE_OR_CROP = CN()
    cfg.INPUT.RESIZE_OR_CROP.ENABLED = False
    cfg.INPUT.RESIZE_OR_CROP.MIN_SIZES = [400, 500, 600]  # pixels
    cfg.INPUT.RESIZE_OR_CROP.CROP_RANGE = [384, 600]  # smallest and largest side in pixels

    # Large-scale jittering (Ghiasi et al. 2021), instead of resizing and cropping as above: images
    # are scaled to fit a square of SIZE pixels, times a factor from SCALE_RANGE, and then cropped
    # or padded to that square.
    cfg.INPUT.LARGE_SCALE_JITTER = CN()
    cfg.INPUT.LARGE_SCALE_JITTER.ENABLED = False
    cfg.INPUT.LARGE_SCALE_JITTER.SCALE_RANGE = [0.1, 2.0]
    cfg.INPUT.LARGE_SCALE_JITTER.SIZE = 1024
    # Random brightness, contrast, saturation and hue (SSD; Detectron2's ColorAugSSDTransform).
    cfg.INPUT.COLOR_JITTER = False
    # Probability of copy-paste (Ghiasi et al. 2021): some things of another training image, which
    # is augmented in the same way, are pasted into an image. Only with LARGE_SCALE_JITTER.
    cfg.INPUT.COPY_PASTE = 0.0

    # False, other than in Detectron2: batches that are grouped by aspect ratio depend on earlier
    # images, so such a run cannot be resumed exactly.
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    # False, other than in Detectron2: images without objects are examples of "no object".
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False


def _add_image_folder_keys(cfg: CN) -> None:
    # Custom data sets for image classification: a list of [name, root]. Each class is a folder of
    # images in root, and its name is the name of the class.
    cfg.DATASETS.CUSTOM_IMAGE_FOLDERS = []

    # Augmentation to MODEL.CLASSIFIER.IMAGE_SIZE. The defaults are those of DeiT.
    cfg.INPUT.CLASSIFICATION = CN()
    # "resized": a random part of the image, resized. "padded": the whole image, shifted by up to
    # PADDING pixels over black.
    cfg.INPUT.CLASSIFICATION.TRAIN_CROP = "resized"
    cfg.INPUT.CLASSIFICATION.SCALE = [0.08, 1.0]  # area of the part relative to the image
    cfg.INPUT.CLASSIFICATION.RATIO = [3 / 4, 4 / 3]  # width over height of the part
    cfg.INPUT.CLASSIFICATION.PADDING = 4  # pixels, for "padded"
    cfg.INPUT.CLASSIFICATION.HFLIP = 0.5  # probability of a horizontal flip
    # A policy in timm's notation. "": no policy, and COLOR_JITTER instead.
    cfg.INPUT.CLASSIFICATION.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
    cfg.INPUT.CLASSIFICATION.COLOR_JITTER = 0.4  # strength for brightness, contrast, saturation
    cfg.INPUT.CLASSIFICATION.RANDOM_ERASING = 0.25  # probability
    # "bilinear", "bicubic" or "random". In evaluation, "random" is "bicubic".
    cfg.INPUT.CLASSIFICATION.INTERPOLATION = "bicubic"
    cfg.INPUT.CLASSIFICATION.CROP_PCT = 0.875  # part of the short side that evaluation uses
    # Consecutive draws of an image, each with its own augmentation (DeiT: 3).
    cfg.INPUT.CLASSIFICATION.REPEATED_AUGMENTATION = 1


def _add_model_keys(cfg: CN) -> None:
    # "cuda", "cuda:1", ..., or "cpu".
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    # Start training from a model of other classes (--init-from). Of its class head, the rows of
    # classes with the same name are kept. Overrides MODEL.WEIGHTS; not used by evaluation and
    # resuming.
    cfg.MODEL.INIT_FROM = ""
    # Activation checkpointing: these parts keep only their inputs and compute their activations
    # again in the backward pass. Less memory, more time, the same losses and gradients. Any of
    # "backbone" (each block of a ResNet), "encoder", "decoder" (each layer) and "mask_head".
    cfg.MODEL.ACTIVATION_CHECKPOINTING = []


def _add_backbone_keys(cfg: CN) -> None:
    # The backbone "build_small_resnet_backbone": a ResNet of basic blocks for small images.
    cfg.MODEL.SMALL_RESNET = CN()
    cfg.MODEL.SMALL_RESNET.STEM_CHANNELS = 32
    cfg.MODEL.SMALL_RESNET.STAGE_CHANNELS = [32, 64, 96, 128]  # res2, res3, ...
    cfg.MODEL.SMALL_RESNET.STAGE_STRIDES = [1, 2, 2, 1]  # after the stem's stride of 4
    cfg.MODEL.SMALL_RESNET.BLOCKS_PER_STAGE = 1
    cfg.MODEL.SMALL_RESNET.NORM = "BN"  # as in Detectron2's layers

    # The backbone "build_swin_backbone": Swin Transformer as in published detectors, with a layer
    # norm per map. The defaults are those of Swin-T.
    cfg.MODEL.SWIN = CN()
    cfg.MODEL.SWIN.EMBED_DIM = 96  # channels of res2
    cfg.MODEL.SWIN.DEPTHS = [2, 2, 6, 2]  # blocks of each stage
    cfg.MODEL.SWIN.NUM_HEADS = [3, 6, 12, 24]
    cfg.MODEL.SWIN.WINDOW_SIZE = 7  # side of a window in pixels of the maps
    # Stochastic depth: probability of skipping the last block, rising linearly from 0.
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.3

    # The backbone "build_timm_backbone": any timm model with feature maps. TESTED_TIMM_MODELS in
    # modeling/backbone lists those covered by tests. As for ResNets, MODEL.BACKBONE.FREEZE_AT 2
    # freezes everything up to res2, and 0 freezes nothing.
    cfg.MODEL.TIMM = CN()
    cfg.MODEL.TIMM.NAME = "resnet50"
    # Feature maps, named by stride: res2 is 4, res3 is 8, res4 is 16, res5 is 32.
    cfg.MODEL.TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.TIMM.FROZEN_BN = True  # batch norms keep statistics, scale and shift
    # Normalise the channels of each pixel of the maps. Those of some models are large (deviation 8
    # for EfficientNet-Lite0) and would dominate the query embeddings in the mask head.
    cfg.MODEL.TIMM.NORMALIZE_MAPS = False
    # Let timm download weights. MODEL.WEIGHTS is read afterwards and needs no network.
    cfg.MODEL.TIMM.PRETRAINED = False


def _add_detr_keys(cfg: CN) -> None:
    # Sizes and losses that all transformers share. The defaults are those of DETR.
    cfg.MODEL.DETR = CN()
    # Name in the TRANSFORMER registry: "detr", "conditional", "deformable", "smca",
    # "smca_multiscale" or "mask2former", which predicts no boxes.
    cfg.MODEL.DETR.TRANSFORMER_NAME = "detr"
    # Number of classes, things and stuff together. 0: that of the data sets.
    cfg.MODEL.DETR.NUM_CLASSES = 0
    cfg.MODEL.DETR.NUM_OBJECT_QUERIES = 100
    # Backbone map whose pixels are the tokens of a single-scale encoder.
    cfg.MODEL.DETR.IN_FEATURE = "res5"
    cfg.MODEL.DETR.HIDDEN_DIM = 256  # width of tokens and queries
    cfg.MODEL.DETR.NHEADS = 8  # attention heads of encoder, decoder and mask head
    cfg.MODEL.DETR.DIM_FEEDFORWARD = 2048  # hidden width of the feed-forward layers
    cfg.MODEL.DETR.ENC_LAYERS = 6
    cfg.MODEL.DETR.DEC_LAYERS = 6
    cfg.MODEL.DETR.DROPOUT = 0.1
    # Layer norm before instead of after attention and feed-forward.
    cfg.MODEL.DETR.PRE_NORM = False
    # Class and box losses on every decoder layer instead of only the last one.
    cfg.MODEL.DETR.DEEP_SUPERVISION = True
    # Class scores: "softmax" (with a "no object" class) or "focal" (sigmoid, without one).
    cfg.MODEL.DETR.SCORING = "softmax"
    cfg.MODEL.DETR.NO_OBJECT_WEIGHT = 0.1  # class weight of "no object" (softmax only)
    # Average the softmax loss of classes, and that of MODEL.SEMANTIC_AUX, over the queries and
    # pixels of all processes. Published: within each; the other losses are over all of them anyway.
    cfg.MODEL.DETR.SYNC_CLASS_LOSS = False
    cfg.MODEL.DETR.FOCAL_ALPHA = 0.25  # weight of positives (focal only)
    # Terms of the matching cost and losses, by their names in COST_REGISTRY and LOSS_REGISTRY
    # (docs/extending.md). mask_loss is left out where MODEL.MASK_ON is False.
    cfg.MODEL.DETR.COSTS = ["class_cost", "box_l1_cost", "box_giou_cost"]
    cfg.MODEL.DETR.LOSSES = ["class_loss", "box_l1_loss", "box_giou_loss", "mask_loss"]
    # Weights of the matching cost: class, L1 distance of boxes, generalised IoU.
    cfg.MODEL.DETR.COST_CLASS = 1.0
    cfg.MODEL.DETR.COST_BBOX = 5.0
    cfg.MODEL.DETR.COST_GIOU = 2.0
    # Weights of the corresponding losses.
    cfg.MODEL.DETR.CLASS_WEIGHT = 1.0
    cfg.MODEL.DETR.BBOX_WEIGHT = 5.0
    cfg.MODEL.DETR.GIOU_WEIGHT = 2.0
    # False: evaluation processes images of different sizes one at a time, so that no image is
    # padded and no result depends on the batch. True: they are padded to a common size. The
    # transformer "mask2former" has no padding mask, as published, so that the results of a padded
    # image then depend on the batch.
    cfg.MODEL.DETR.PAD_IN_TEST = False


def _add_transformer_keys(cfg: CN) -> None:
    # The transformer "deformable".
    cfg.MODEL.DEFORMABLE = CN()
    # Backbone maps that become tokens, fine to coarse.
    cfg.MODEL.DEFORMABLE.IN_FEATURES = ["res3", "res4", "res5"]
    # Number of levels. Those beyond IN_FEATURES are strided convolutions of the last map.
    cfg.MODEL.DEFORMABLE.NUM_FEATURE_LEVELS = 4
    # Sampling points per head and level, in the encoder and in the decoder.
    cfg.MODEL.DEFORMABLE.ENC_POINTS = 4
    cfg.MODEL.DEFORMABLE.DEC_POINTS = 4
    # Box refinement: each decoder layer has its own head, whose boxes are the reference of the
    # next layer.
    cfg.MODEL.DEFORMABLE.BOX_REFINE = False
    # Two stages: the queries are the best box proposals of the encoder. Needs BOX_REFINE.
    cfg.MODEL.DEFORMABLE.TWO_STAGE = False
    # True, as published: strided convolutions and group norms of the input projections read the
    # padding, so that a padded image depends on its batch. The weights are the same either way.
    cfg.MODEL.DEFORMABLE.SEE_PADDING = False
    # Learning rate of sampling offsets and reference points relative to SOLVER.BASE_LR.
    cfg.MODEL.DEFORMABLE.LR_FACTOR = 0.1

    # The transformers "smca" and "smca_multiscale".
    cfg.MODEL.SMCA = CN()
    # Predicted shape of the Gaussian around the centre of a head (--dynamic_scale of the public
    # code): "fixed" (type1: none), "isotropic" (type2: a factor on the squared distance),
    # "per_axis" (type3, the published results: factors for x and y) or "per_axis_and_product"
    # (type4: another factor, for the product of both squared distances).
    cfg.MODEL.SMCA.DYNAMIC_SCALE = "per_axis"
    # Divisor of squared distances, in cells of 32 pixels (--smooth). Larger values widen the
    # Gaussian.
    cfg.MODEL.SMCA.SMOOTH = 8.0
    # "smca_multiscale": backbone maps, fine to coarse. Another level has half the last one's size.
    cfg.MODEL.SMCA.IN_FEATURES = ["res3", "res4", "res5"]
    # "smca_multiscale": True, as published: convolutions and resizing in the encoder read the
    # padding, so that a padded image depends on its batch. The weights are the same either way.
    cfg.MODEL.SMCA.SEE_PADDING = False


def _add_mask2former_keys(cfg: CN) -> None:
    # The transformer "mask2former": backbone maps, fine to coarse. The first becomes the per-pixel
    # features, the others become tokens.
    cfg.MODEL.MASK2FORMER = CN()
    cfg.MODEL.MASK2FORMER.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    # Channels of mask embeddings and per-pixel features.
    cfg.MODEL.MASK2FORMER.MASK_DIM = 256
    # Encoder of the pixel decoder: points per head and level, width of the feed-forward network.
    cfg.MODEL.MASK2FORMER.ENC_POINTS = 4
    cfg.MODEL.MASK2FORMER.ENC_DIM_FEEDFORWARD = 1024
    # Points per mask in the cost point_mask_cost and the loss point_mask_loss.
    cfg.MODEL.MASK2FORMER.NUM_POINTS = 12544
    # Random points to choose uncertain ones from, as a multiple of NUM_POINTS, and the share of
    # points that are chosen by uncertainty.
    cfg.MODEL.MASK2FORMER.OVERSAMPLE_RATIO = 3.0
    cfg.MODEL.MASK2FORMER.IMPORTANCE_SAMPLE_RATIO = 0.75
    # Weights of cross entropy and Dice, in the cost and in the loss.
    cfg.MODEL.MASK2FORMER.MASK_WEIGHT = 5.0
    cfg.MODEL.MASK2FORMER.DICE_WEIGHT = 5.0
    # Mask-piloted training (MP-Former): in training, extra queries attend within true masks and
    # are supervised with their objects. Evaluation does not change.
    cfg.MODEL.MASK2FORMER.PILOT = CN()
    cfg.MODEL.MASK2FORMER.PILOT.ENABLED = False
    # Most extra queries of an image. They are divided into groups of one query for each object of
    # the image of the batch with the most objects.
    cfg.MODEL.MASK2FORMER.PILOT.NUM_QUERIES = 100
    # Probability that the class of an extra query is replaced by a random one.
    cfg.MODEL.MASK2FORMER.PILOT.LABEL_NOISE = 0.2
    # Expected number of flipped cells of a mask, as a share of the cells that its object covers.
    cfg.MODEL.MASK2FORMER.PILOT.MASK_NOISE = 0.2


def _add_head_keys(cfg: CN) -> None:
    # The mask head, built with MODEL.MASK_ON, by its name in MASK_HEAD_REGISTRY.
    cfg.MODEL.MASK_HEAD = CN()
    cfg.MODEL.MASK_HEAD.NAME = "detr_mask_head"
    # Backbone maps that are added to the upsampled attention maps, coarse to fine.
    cfg.MODEL.MASK_HEAD.IN_FEATURES = ["res4", "res3", "res2"]
    # Widths of the second to fifth convolution. Empty: HIDDEN_DIM / 2, / 4, / 8, / 16 as published.
    cfg.MODEL.MASK_HEAD.CHANNELS = []
    # Weights of the focal and the Dice loss.
    cfg.MODEL.MASK_HEAD.MASK_WEIGHT = 1.0
    cfg.MODEL.MASK_HEAD.DICE_WEIGHT = 1.0
    # Resolution of the mask losses: that of the padded "target" (published) or the "prediction".
    cfg.MODEL.MASK_HEAD.LOSS_RESOLUTION = "target"
    # Mask losses on every decoder layer; published: on the last one only.
    cfg.MODEL.MASK_HEAD.DEEP_SUPERVISION = False
    # Train only the mask head; all other parameters keep the loaded weights.
    cfg.MODEL.MASK_HEAD.FREEZE_DETR = False
    # MiB of feature maps above which queries are decoded in several steps, so that a crowded image
    # does not run out of memory (at 800 x 1066 a query takes 36 MiB). In training, such steps are
    # recomputed in the backward pass. The results are the same up to rounding.
    cfg.MODEL.MASK_HEAD.STEP_MEMORY = 8192

    # An auxiliary loss that is not in DETR: in training, the class of each pixel is also predicted
    # from backbone maps. This shortens the slow start of a backbone without pretrained weights.
    cfg.MODEL.SEMANTIC_AUX = CN()
    cfg.MODEL.SEMANTIC_AUX.ENABLED = False
    cfg.MODEL.SEMANTIC_AUX.IN_FEATURES = ["res3", "res5"]
    cfg.MODEL.SEMANTIC_AUX.WEIGHT = 1.0  # of the loss of each map


def _add_panoptic_keys(cfg: CN) -> None:
    # Panoptic inference.
    cfg.MODEL.PANOPTIC = CN()
    # Contiguous ids of the thing classes. Empty: those of the data sets.
    cfg.MODEL.PANOPTIC.THING_CLASS_IDS = []
    # Queries whose best class does not score above this value are dropped (0 to 1).
    cfg.MODEL.PANOPTIC.SCORE_THRESHOLD_TEST = 0.85
    # Assignment of pixels to the kept queries: "strongest" (the largest mask logit; queries of one
    # stuff class form one segment), "published" (PostProcessPanoptic of DETR, including its
    # defects) or "mask2former" (largest score times mask probability, if the latter is at least
    # 0.5).
    cfg.MODEL.PANOPTIC.MERGE_TEST = "strongest"
    # Segments with at most this many pixels are dropped (not by "mask2former").
    cfg.MODEL.PANOPTIC.MIN_AREA_TEST = 4
    # Pixels without a mask probability of at least this value are void ("strongest" only).
    cfg.MODEL.PANOPTIC.MASK_THRESHOLD_TEST = 0.0
    # A query is dropped if it gets less than this part of its own mask ("mask2former" only).
    cfg.MODEL.PANOPTIC.OVERLAP_THRESHOLD_TEST = 0.8
    # Of things whose masks have a larger IoU than this, only the best is kept. 1.0: all are kept
    # (published).
    cfg.MODEL.PANOPTIC.DUPLICATE_IOU_TEST = 1.0
    # Also return instances (boxes, masks and scores of things), which box and mask AP need. Their
    # masks cost time. At most TEST.DETECTIONS_PER_IMAGE above the score threshold are returned.
    cfg.MODEL.PANOPTIC.INSTANCES_TEST = True
    cfg.MODEL.PANOPTIC.INSTANCE_SCORE_THRESHOLD_TEST = 0.0
    # Choice and score of instances. "detr": the best pairs of a query and a thing class by their
    # class score; with softmax scoring only a query's best class counts. "mask2former": the best
    # pairs of a query and any class by class probability, of which the things are kept, scored by
    # class probability times the mean mask probability within the mask.
    cfg.MODEL.PANOPTIC.INSTANCE_SCORING_TEST = "detr"
    # Also return "sem_seg", a score for each class and pixel (semantic inference of Mask2Former),
    # and measure the mean IoU of its best classes. It needs the masks of all queries.
    cfg.MODEL.PANOPTIC.SEMANTIC_TEST = False


def _add_batchformer_keys(cfg: CN) -> None:
    cfg.MODEL.BATCHFORMER = CN()
    cfg.MODEL.BATCHFORMER.ENABLED = False
    # Encoder layers (from 0) that are followed by the block. DeiT: [8], the ninth of twelve.
    cfg.MODEL.BATCHFORMER.INSERT_LAYERS = [0]
    cfg.MODEL.BATCHFORMER.NUM_HEADS = 4
    # Hidden width of the feed-forward layer. 0: the width of the encoder's tokens, as published.
    cfg.MODEL.BATCHFORMER.DIM_FEEDFORWARD = 0
    cfg.MODEL.BATCHFORMER.DROPOUT = 0.5
    # One block for all INSERT_LAYERS instead of one for each.
    cfg.MODEL.BATCHFORMER.SHARED = False
    # Images that a token attends to, at its position. "batch": all images of a process, as
    # published. "self": its own only, a control without a path between images, which needs no batch
    # of two. "none": there is no layer between the streams, which checks the code. The weights are
    # the same, so a run can change over.
    cfg.MODEL.BATCHFORMER.ATTEND = "batch"
    # "batch" means the images of all processes, for one or two on each GPU. All of them are padded
    # to one size, as in one process. Published: False.
    cfg.MODEL.BATCHFORMER.SYNC = False
    # The second stream opens at every so many steps only (when the number of the step, from 0, is a
    # multiple), which costs less. The others are steps of the plain model; as the total of two
    # streams is their mean, all steps weigh the same. Published: 1.
    cfg.MODEL.BATCHFORMER.EVERY = 1
    # Exclude padded positions of an image from the attention over the batch. Published: False.
    cfg.MODEL.BATCHFORMER.MASK_PADDING = False
    # Factors of the losses of the (original, batchformer) streams. [1.0, 1.0] is the published
    # total, a mean over both streams.
    cfg.MODEL.BATCHFORMER.STREAM_WEIGHTS = [1.0, 1.0]
    # Learning rate of the block relative to SOLVER.BASE_LR. DeiT: 0.5.
    cfg.MODEL.BATCHFORMER.LR_FACTOR = 1.0


def _add_classifier_keys(cfg: CN) -> None:
    # The meta-architecture "ImageClassifier": a vision Transformer of timm. The defaults are those
    # of DeiT with BatchFormerV2, unless a comment differs.
    cfg.MODEL.CLASSIFIER = CN()
    # A timm VisionTransformer (vit_*, deit_*, deit3_* and others), not a distilled one. Published:
    # deit_tiny_patch16_224, deit_small_patch16_224, deit_base_patch16_224.
    cfg.MODEL.CLASSIFIER.NAME = "deit_small_patch16_224"
    # Number of classes. 0: that of the data sets.
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 0
    cfg.MODEL.CLASSIFIER.IMAGE_SIZE = 224  # height and width in pixels
    # Stochastic depth: probability of skipping the last block, rising linearly from 0.
    cfg.MODEL.CLASSIFIER.DROP_PATH = 0.1
    # Part of the target that is spread evenly over all classes.
    cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING = 0.1
    # In training, pairs of images and their targets are mixed: blended (mixup), or with swapped
    # patches (CutMix). The shares are drawn from Beta(alpha, alpha). 0: off.
    cfg.MODEL.CLASSIFIER.MIXUP_ALPHA = 0.8
    cfg.MODEL.CLASSIFIER.CUTMIX_ALPHA = 1.0
    cfg.MODEL.CLASSIFIER.MIXUP_PROB = 1.0  # probability of mixing a batch
    cfg.MODEL.CLASSIFIER.SWITCH_PROB = 0.5  # probability of CutMix if both are on
    # Let timm download weights. MODEL.WEIGHTS is read afterwards and needs no network. Published:
    # False.
    cfg.MODEL.CLASSIFIER.PRETRAINED = False
    # Further arguments of the timm model, as pairs: [["embed_dim", 64], ["depth", 4]].
    cfg.MODEL.CLASSIFIER.TIMM_KWARGS = []


def _add_solver_keys(cfg: CN) -> None:
    cfg.SOLVER.OPTIMIZER = "ADAMW"  # or "SGD"
    cfg.SOLVER.BASE_LR = 1e-4
    # Learning rate of the backbone relative to SOLVER.BASE_LR.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    cfg.SOLVER.WEIGHT_DECAY = 1e-4
    # Weight decay of normalisation layers. None: SOLVER.WEIGHT_DECAY, as in DETR.
    cfg.SOLVER.WEIGHT_DECAY_NORM = None
    # Weight decay of embedding layers and of the embeddings of vision Transformers. None:
    # SOLVER.WEIGHT_DECAY. Mask2Former: 0.0, as for WEIGHT_DECAY_NORM; DeiT: 0.0, as for
    # WEIGHT_DECAY_NORM and WEIGHT_DECAY_BIAS.
    cfg.SOLVER.WEIGHT_DECAY_EMBED = None
    # "full_model" clips the gradient norm of the whole model, as in DETR. Detectron2's types
    # "value" and "norm" clip each parameter.
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.1  # largest norm, or largest value
    cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = 2.0
    # Number of the newest model_*.pth that are kept besides model_best.pth and model_final.pth.
    # 0: all.
    cfg.SOLVER.CHECKPOINTS_KEPT = 0
    # Number of batches whose gradients are averaged for one optimizer step, which is one iteration.
    # Each has SOLVER.IMS_PER_BATCH images; BatchFormerV2 attends over these, and the losses are
    # normalised by the number of objects in them. The result is a mean over batches, not the
    # result of one large batch.
    cfg.SOLVER.GRADIENT_ACCUMULATION = 1
    # How several processes exchange gradients: "none" as they are, "bfloat16" rounded to 8 bits of
    # mantissa, which halves the bytes and pays where the connection is slow (docs/benchmarks.md).
    cfg.SOLVER.GRADIENT_COMPRESSION = "none"
    # Length of the training in passes over the training images, from which the schedule follows:
    # MAX_ITER is EPOCHS times the number of images (after filtering) divided by the images of an
    # iteration, IMS_PER_BATCH times GRADIENT_ACCUMULATION, rounded up; STEPS change in proportion
    # to MAX_ITER; WARMUP_ITERS is at most a tenth of MAX_ITER; CHECKPOINT_PERIOD and
    # TEST.EVAL_PERIOD are an eighth of it, rounded up. Those of these keys that are on the command
    # line keep their value. A run logs the result and writes it to config.yaml, with EPOCHS 0.
    # 0: off.
    cfg.SOLVER.EPOCHS = 0
    # Decay of the exponential moving average of the weights, which is evaluated instead of the
    # last weights. 0: off.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Half precision of SOLVER.AMP.ENABLED: "bfloat16", or "float16" with loss scaling (GPUs only).
    # "": bfloat16 on a CPU and on GPUs that compute in it, otherwise float16.
    cfg.SOLVER.AMP.DTYPE = ""
    # Train with torch.compile (backbone, layers of the transformer, norms of the mask head), which
    # needs a compiler. The first steps take long; new image sizes are not compiled again. Losses
    # are equal up to rounding, except that dropout draws other numbers. Evaluation is as without;
    # TEST.FAST.COMPILE compiles that. Not measured on a GPU.
    cfg.SOLVER.COMPILE = False
    # On GPUs that have TF32, train_net.py computes float32 convolutions and matrix products in it:
    # their inputs are rounded to 10 bits, their sums are in float32. False: no TF32, not even in
    # convolutions, where PyTorch uses it by default.
    cfg.SOLVER.TF32 = True


def _add_test_keys(cfg: CN) -> None:
    # Images per process in one evaluation step.
    cfg.TEST.IMS_PER_BATCH = 1

    # Evaluation, the demo and drawn predictions use a faster copy of the model with equal results
    # up to rounding: conv-bn fusion, and feature maps in channels-last order.
    cfg.TEST.FAST = CN()
    cfg.TEST.FAST.ENABLED = False
    # Compile backbone, layers of the transformer and norms of the mask head with torch.compile,
    # which needs a compiler. The first images take long; new sizes are not compiled again.
    cfg.TEST.FAST.COMPILE = False
    # Convolutions and matrix products in bfloat16. Scores, boxes, softmaxes over pixels, the
    # resizing of masks and everything after it stay in float32.
    cfg.TEST.FAST.BFLOAT16 = False
