"""Every configuration key this project adds to Detectron2's defaults."""

import torch
from detectron2.config import CfgNode as CN


def add_batchformer_panoptic_config(cfg: CN) -> None:
    """Add this project's keys, with defaults that run, to a Detectron2 config in place.

    Existing Detectron2 keys are reused where they mean the same thing: ``MODEL.MASK_ON`` asks for
    the panoptic mask head, ``MODEL.WEIGHTS``, ``SOLVER.*``, ``INPUT.*``, ``TEST.*`` are as usual.
    """
    _add_input_keys(cfg)
    _add_image_folder_keys(cfg)
    _add_detr_keys(cfg)
    _add_classification_keys(cfg)
    _add_batchformer_keys(cfg)
    _add_panoptic_keys(cfg)
    _add_solver_keys(cfg)
    # Start a training from a trained model of other classes, without its class head (--init-from).
    # Takes the place of MODEL.WEIGHTS; evaluation and resuming do not read it.
    cfg.MODEL.INIT_FROM = ""
    # Parts that keep their inputs alone for the backward pass and run a second time in it: less
    # memory, more time, same losses and gradients. Of "backbone" (each block of a ResNet for
    # itself), "encoder", "decoder" (each layer for itself) and "mask_head".
    cfg.MODEL.ACTIVATION_CHECKPOINTING = []
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _add_input_keys(cfg: CN) -> None:
    # Data sets of one's own: a list of [name, image_root, panoptic_root, panoptic_json]. Things and
    # stuff, class names, colours and the number of classes come from the JSON's "categories".
    cfg.DATASETS.CUSTOM_PANOPTIC = []
    # The same for boxes alone: [name, image_root, instances_json]; every class is a thing.
    cfg.DATASETS.CUSTOM_INSTANCES = []

    # The augmentation of DETR: half of the images are resized as INPUT.MIN_SIZE_TRAIN says; the
    # other half is resized to one of MIN_SIZES, cropped with both sides drawn from CROP_RANGE
    # (pixels, inclusive), and then resized as INPUT.MIN_SIZE_TRAIN says.
    cfg.INPUT.RESIZE_OR_CROP = CN()
    cfg.INPUT.RESIZE_OR_CROP.ENABLED = False
    cfg.INPUT.RESIZE_OR_CROP.MIN_SIZES = [400, 500, 600]
    cfg.INPUT.RESIZE_OR_CROP.CROP_RANGE = [384, 600]

    # Detectron2 groups images by aspect ratio; such a stream cannot be resumed exactly.
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    # An image without objects teaches "no object".
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False

    # Images per process in one evaluation step.
    cfg.TEST.IMS_PER_BATCH = 1

    # Evaluation, the demo and predictions that are drawn run on a faster copy of the model, equal
    # up to rounding: batch norms folded into convolutions, maps in channels-last order.
    cfg.TEST.FAST = CN()
    cfg.TEST.FAST.ENABLED = False
    # Compile the backbone (torch.compile); needs a compiler. Pays where many images have few
    # different sizes, for every new size compiles once more.
    cfg.TEST.FAST.COMPILE = False
    # Convolutions and matrix products in bfloat16. Scores, boxes, softmaxes over the cells of a
    # map, the resizing of masks and all that follows stay in float32.
    cfg.TEST.FAST.BFLOAT16 = False


def _add_image_folder_keys(cfg: CN) -> None:
    # Data sets of one's own for image classification: a list of [name, root] with a folder of
    # images for each class in root. The classes are the names of the folders.
    cfg.DATASETS.CUSTOM_IMAGE_FOLDERS = []

    # Augmentation to MODEL.CLASSIFIER.IMAGE_SIZE; the defaults are those of DeiT.
    cfg.INPUT.CLASSIFICATION = CN()
    # "resized": a random part of the image, resized. "padded": the whole image, moved by up to
    # PADDING pixels over black.
    cfg.INPUT.CLASSIFICATION.TRAIN_CROP = "resized"
    cfg.INPUT.CLASSIFICATION.SCALE = [0.08, 1.0]  # share of the image's area ("resized")
    cfg.INPUT.CLASSIFICATION.RATIO = [3 / 4, 4 / 3]  # width over height of the part ("resized")
    cfg.INPUT.CLASSIFICATION.PADDING = 4  # pixels ("padded")
    cfg.INPUT.CLASSIFICATION.HFLIP = 0.5  # probability
    # A policy in timm's notation, or "": none, and COLOR_JITTER in its place.
    cfg.INPUT.CLASSIFICATION.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
    cfg.INPUT.CLASSIFICATION.COLOR_JITTER = 0.4  # of brightness, contrast and saturation
    cfg.INPUT.CLASSIFICATION.RANDOM_ERASING = 0.25  # probability
    # "bilinear", "bicubic", or "random", which is "bicubic" in evaluation.
    cfg.INPUT.CLASSIFICATION.INTERPOLATION = "bicubic"
    cfg.INPUT.CLASSIFICATION.CROP_PCT = 0.875  # share of the short side seen in evaluation
    # Draws of an image in a row, each with its own augmentation (DeiT: 3).
    cfg.INPUT.CLASSIFICATION.REPEATED_AUGMENTATION = 1


def _add_detr_keys(cfg: CN) -> None:
    cfg.MODEL.DETR = CN()
    # Which transformer of the TRANSFORMER registry to build.
    cfg.MODEL.DETR.TRANSFORMER_NAME = "detr"
    # Number of classes, things and stuff together. 0: that of the data sets.
    cfg.MODEL.DETR.NUM_CLASSES = 0
    cfg.MODEL.DETR.NUM_OBJECT_QUERIES = 100
    # Backbone map that becomes the tokens of the encoder.
    cfg.MODEL.DETR.IN_FEATURE = "res5"
    cfg.MODEL.DETR.HIDDEN_DIM = 256
    cfg.MODEL.DETR.NHEADS = 8
    cfg.MODEL.DETR.DIM_FEEDFORWARD = 2048
    cfg.MODEL.DETR.ENC_LAYERS = 6
    cfg.MODEL.DETR.DEC_LAYERS = 6
    cfg.MODEL.DETR.DROPOUT = 0.1
    # Layer norm before instead of after attention and feed-forward.
    cfg.MODEL.DETR.PRE_NORM = False
    # Losses on every decoder layer and not on the last one alone.
    cfg.MODEL.DETR.DEEP_SUPERVISION = True
    # How classes are scored: "softmax" (with a "no object" class) or "focal" (sigmoid, without).
    cfg.MODEL.DETR.SCORING = "softmax"
    cfg.MODEL.DETR.NO_OBJECT_WEIGHT = 0.1  # class weight of "no object" (softmax only)
    cfg.MODEL.DETR.FOCAL_ALPHA = 0.25  # weight of the positives (focal only)
    # Terms of the matching cost and losses, by their names in COST_REGISTRY and LOSS_REGISTRY
    # (docs/extending.md); mask_loss is left out where MODEL.MASK_ON is False.
    cfg.MODEL.DETR.COSTS = ["class_cost", "box_l1_cost", "box_giou_cost"]
    cfg.MODEL.DETR.LOSSES = ["class_loss", "box_l1_loss", "box_giou_loss", "mask_loss"]
    # Their weights.
    cfg.MODEL.DETR.COST_CLASS = 1.0
    cfg.MODEL.DETR.COST_BBOX = 5.0
    cfg.MODEL.DETR.COST_GIOU = 2.0
    cfg.MODEL.DETR.CLASS_WEIGHT = 1.0
    cfg.MODEL.DETR.BBOX_WEIGHT = 5.0
    cfg.MODEL.DETR.GIOU_WEIGHT = 2.0
    # False: in evaluation images of different sizes run one after the other, so that no image is
    # padded and no result depends on its batch mates. True: they are padded to a common size.
    cfg.MODEL.DETR.PAD_IN_TEST = False

    # The transformer "deformable": backbone maps that become tokens, fine to coarse.
    cfg.MODEL.DEFORMABLE = CN()
    cfg.MODEL.DEFORMABLE.IN_FEATURES = ["res3", "res4", "res5"]
    # Levels in all; those beyond IN_FEATURES come from the last map by strided convolutions.
    cfg.MODEL.DEFORMABLE.NUM_FEATURE_LEVELS = 4
    # Points that a head looks at on each level, in the encoder and in the decoder.
    cfg.MODEL.DEFORMABLE.ENC_POINTS = 4
    cfg.MODEL.DEFORMABLE.DEC_POINTS = 4
    # Each decoder layer has a head of its own, whose boxes are where the next layer looks.
    cfg.MODEL.DEFORMABLE.BOX_REFINE = False
    # The queries are the best boxes that the encoder proposes. Needs BOX_REFINE.
    cfg.MODEL.DEFORMABLE.TWO_STAGE = False
    # True, as published: strided convolutions and group norms of the input projections see what
    # lies in the padding, so that a padded image depends on its batch mates. No weight differs.
    cfg.MODEL.DEFORMABLE.SEE_PADDING = False
    # Learning rate of sampling offsets and reference points relative to SOLVER.BASE_LR.
    cfg.MODEL.DEFORMABLE.LR_FACTOR = 0.1

    # The transformers "smca" and "smca_multiscale".
    cfg.MODEL.SMCA = CN()
    # What shapes the Gaussian around which a head attends, beside its place (flag --dynamic_scale
    # of the public code): "fixed" (type1: nothing), "isotropic" (type2: a factor on the squared
    # distance), "per_axis" (type3, used for its results: one for x, one for y) or
    # "per_axis_and_product" (type4: one more, for the product of both squared distances).
    cfg.MODEL.SMCA.DYNAMIC_SCALE = "per_axis"
    # Divisor of squared distances in cells of 32 pixels (--smooth); larger looks wider.
    cfg.MODEL.SMCA.SMOOTH = 8.0
    # "smca_multiscale": backbone maps, fine to coarse; a level of half the last one's size follows.
    cfg.MODEL.SMCA.IN_FEATURES = ["res3", "res4", "res5"]
    # "smca_multiscale": True, as published: convolutions and resizing in the encoder see what lies
    # in the padding, so that a padded image depends on its batch mates. No weight differs.
    cfg.MODEL.SMCA.SEE_PADDING = False

    # The transformer "mask2former": backbone maps, fine to coarse; the first gives the per-pixel
    # features, the others become tokens.
    cfg.MODEL.MASK2FORMER = CN()
    cfg.MODEL.MASK2FORMER.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    # Channels of mask embeddings and per-pixel features.
    cfg.MODEL.MASK2FORMER.MASK_DIM = 256
    # Deformable encoder of the pixel decoder: points of each head and level, feed-forward width.
    cfg.MODEL.MASK2FORMER.ENC_POINTS = 4
    cfg.MODEL.MASK2FORMER.ENC_DIM_FEEDFORWARD = 1024
    # Costs and losses at points: their number for each mask; random points from which the uncertain
    # ones are chosen, as a multiple; share of uncertain points; weights of cross entropy and Dice.
    cfg.MODEL.MASK2FORMER.NUM_POINTS = 12544
    cfg.MODEL.MASK2FORMER.OVERSAMPLE_RATIO = 3.0
    cfg.MODEL.MASK2FORMER.IMPORTANCE_SAMPLE_RATIO = 0.75
    cfg.MODEL.MASK2FORMER.MASK_WEIGHT = 5.0
    cfg.MODEL.MASK2FORMER.DICE_WEIGHT = 5.0

    # The mask head (built when MODEL.MASK_ON), by its name in MASK_HEAD_REGISTRY.
    cfg.MODEL.MASK_HEAD = CN()
    cfg.MODEL.MASK_HEAD.NAME = "detr_mask_head"
    # Backbone maps that it reads, coarse to fine.
    cfg.MODEL.MASK_HEAD.IN_FEATURES = ["res4", "res3", "res2"]
    # Widths of its second to fifth convolution. Empty: HIDDEN_DIM / 2, / 4, / 8, / 16 as published.
    cfg.MODEL.MASK_HEAD.CHANNELS = []
    cfg.MODEL.MASK_HEAD.MASK_WEIGHT = 1.0
    cfg.MODEL.MASK_HEAD.DICE_WEIGHT = 1.0
    # Mask losses at the resolution of the padded "target" (published) or of the "prediction".
    cfg.MODEL.MASK_HEAD.LOSS_RESOLUTION = "target"
    # Mask losses on every decoder layer; published: on the last one only.
    cfg.MODEL.MASK_HEAD.DEEP_SUPERVISION = False
    # Train the mask head only: everything else keeps the weights it was given.
    cfg.MODEL.MASK_HEAD.FREEZE_DETR = False
    # Queries whose maps would take more than about this many MiB are decoded in several steps, so
    # that a crowded image cannot exhaust the memory (at 800 x 1066 a query takes 36 MiB). In
    # training, what such steps compute is computed again in the backward pass. Results are the same
    # up to rounding.
    cfg.MODEL.MASK_HEAD.STEP_MEMORY = 8192

    # Not in DETR: in training, the class of every pixel is also predicted from backbone maps. It
    # shortens the slow start of a backbone without pre-trained weights.
    cfg.MODEL.SEMANTIC_AUX = CN()
    cfg.MODEL.SEMANTIC_AUX.ENABLED = False
    cfg.MODEL.SEMANTIC_AUX.IN_FEATURES = ["res3", "res5"]
    cfg.MODEL.SEMANTIC_AUX.WEIGHT = 1.0  # of each map's loss

    # The backbone "build_small_resnet_backbone": a ResNet of basic blocks for small images.
    cfg.MODEL.SMALL_RESNET = CN()
    cfg.MODEL.SMALL_RESNET.STEM_CHANNELS = 32
    cfg.MODEL.SMALL_RESNET.STAGE_CHANNELS = [32, 64, 96, 128]  # res2, res3, ...
    cfg.MODEL.SMALL_RESNET.STAGE_STRIDES = [1, 2, 2, 1]  # after the stem's stride of 4
    cfg.MODEL.SMALL_RESNET.BLOCKS_PER_STAGE = 1
    cfg.MODEL.SMALL_RESNET.NORM = "BN"

    # The backbone "build_timm_backbone": any model of timm that has feature maps;
    # TESTED_TIMM_MODELS in modeling/backbone lists those that the tests cover. As for ResNets,
    # MODEL.BACKBONE.FREEZE_AT 2 freezes all that res2 is computed from; 0 freezes nothing.
    cfg.MODEL.TIMM = CN()
    cfg.MODEL.TIMM.NAME = "resnet50"
    # Its maps, named by stride: res2 is 4, res3 is 8, res4 is 16, res5 is 32.
    cfg.MODEL.TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.TIMM.FROZEN_BN = True  # batch norms keep statistics, scale and shift
    # Normalise each pixel's channels of the maps. Those of some models are large (deviation 8 for
    # EfficientNet-Lite0), and then drown what the mask head knows of a query.
    cfg.MODEL.TIMM.NORMALIZE_MAPS = False
    # Let timm download weights. MODEL.WEIGHTS, if any, is read afterwards and needs no network.
    cfg.MODEL.TIMM.PRETRAINED = False


def _add_classification_keys(cfg: CN) -> None:
    # The meta-architecture "ImageClassifier": a vision Transformer of timm. The values of DeiT with
    # BatchFormerV2 are the defaults, unless a comment says otherwise.
    cfg.MODEL.CLASSIFIER = CN()
    # A VisionTransformer of timm: vit_*, deit_*, deit3_* and others, but no distilled one.
    # Published: deit_tiny_patch16_224, deit_small_patch16_224, deit_base_patch16_224.
    cfg.MODEL.CLASSIFIER.NAME = "deit_small_patch16_224"
    # Number of classes. 0: that of the data sets.
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 0
    # Height and width of the images, in pixels.
    cfg.MODEL.CLASSIFIER.IMAGE_SIZE = 224
    # Probability that an image skips a block: of the last block, growing linearly from 0.
    cfg.MODEL.CLASSIFIER.DROP_PATH = 0.1
    # Share of the target that is spread evenly over all classes.
    cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING = 0.1
    # In training, the images of a batch are blended in pairs (mixup) or patches are swapped between
    # them (CutMix), and so are their targets: Beta(alpha, alpha) draws the share. 0: off.
    cfg.MODEL.CLASSIFIER.MIXUP_ALPHA = 0.8
    cfg.MODEL.CLASSIFIER.CUTMIX_ALPHA = 1.0
    cfg.MODEL.CLASSIFIER.MIXUP_PROB = 1.0  # that a batch is mixed at all
    cfg.MODEL.CLASSIFIER.SWITCH_PROB = 0.5  # that it is CutMix, where both are on
    # Let timm download weights. MODEL.WEIGHTS, if any, is read afterwards and needs no network.
    # Published: False.
    cfg.MODEL.CLASSIFIER.PRETRAINED = False
    # Further arguments of the timm model, as pairs: [["embed_dim", 64], ["depth", 4]].
    cfg.MODEL.CLASSIFIER.TIMM_KWARGS = []


def _add_batchformer_keys(cfg: CN) -> None:
    cfg.MODEL.BATCHFORMER = CN()
    cfg.MODEL.BATCHFORMER.ENABLED = False
    # Encoder layers (from 0) after which the batch attention acts. DeiT: [8], the ninth of twelve.
    cfg.MODEL.BATCHFORMER.INSERT_LAYERS = [0]
    cfg.MODEL.BATCHFORMER.NUM_HEADS = 4
    # Width of the feed-forward layer. 0: that of the encoder's tokens, as published.
    cfg.MODEL.BATCHFORMER.DIM_FEEDFORWARD = 0
    cfg.MODEL.BATCHFORMER.DROPOUT = 0.5
    # One block for all INSERT_LAYERS instead of one each.
    cfg.MODEL.BATCHFORMER.SHARED = False
    # True: positions that are padding in an image are not attended to. Published: False.
    cfg.MODEL.BATCHFORMER.MASK_PADDING = False
    # Factors on the losses of the (original, batchformer) stream. The published total, an average
    # over both streams, is [1.0, 1.0].
    cfg.MODEL.BATCHFORMER.STREAM_WEIGHTS = [1.0, 1.0]
    # Learning rate of the block relative to SOLVER.BASE_LR. DeiT: 0.5.
    cfg.MODEL.BATCHFORMER.LR_FACTOR = 1.0


def _add_panoptic_keys(cfg: CN) -> None:
    cfg.MODEL.PANOPTIC = CN()
    # Contiguous ids of the thing classes. Empty: those of the data sets.
    cfg.MODEL.PANOPTIC.THING_CLASS_IDS = []
    # Queries whose best class scores no more than this are dropped (0 to 1).
    cfg.MODEL.PANOPTIC.SCORE_THRESHOLD_TEST = 0.85
    # How pixels go to the kept queries: "strongest" (the strongest mask; queries of one stuff class
    # are one segment), "published" (PostProcessPanoptic of DETR, defects included) or "mask2former"
    # (score x mask probability, at least 0.5 of the latter).
    cfg.MODEL.PANOPTIC.MERGE_TEST = "strongest"
    # Segments of no more than this many pixels are dropped (not by "mask2former").
    cfg.MODEL.PANOPTIC.MIN_AREA_TEST = 4
    # Pixels that no kept mask claims with at least this probability stay void ("strongest").
    cfg.MODEL.PANOPTIC.MASK_THRESHOLD_TEST = 0.0
    # A query that wins less than this share of its own mask is dropped ("mask2former").
    cfg.MODEL.PANOPTIC.OVERLAP_THRESHOLD_TEST = 0.8
    # Of things whose masks overlap by more than this IoU the best one stays. 1.0: all (published).
    cfg.MODEL.PANOPTIC.DUPLICATE_IOU_TEST = 1.0
    # Instances (boxes, masks, scores of things) beside the panoptic map: box and mask AP need them.
    # Their masks cost time; of TEST.DETECTIONS_PER_IMAGE at the most, those above the threshold.
    cfg.MODEL.PANOPTIC.INSTANCES_TEST = True
    cfg.MODEL.PANOPTIC.INSTANCE_SCORE_THRESHOLD_TEST = 0.0


def _add_solver_keys(cfg: CN) -> None:
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    # Learning rate of the backbone relative to SOLVER.BASE_LR.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    # Detectron2 clips each parameter by itself; DETR clips the norm over the whole model. That is
    # SOLVER.CLIP_GRADIENTS.CLIP_TYPE "full_model".
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.1
    cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = 2.0
    cfg.SOLVER.BASE_LR = 1e-4
    cfg.SOLVER.WEIGHT_DECAY = 1e-4
    # Weight decay of normalisation layers. None: SOLVER.WEIGHT_DECAY, as DETR.
    cfg.SOLVER.WEIGHT_DECAY_NORM = None
    # Weight decay of position embedding and class token of a vision Transformer. None:
    # SOLVER.WEIGHT_DECAY; DeiT: 0.0, and the same for WEIGHT_DECAY_NORM and WEIGHT_DECAY_BIAS.
    cfg.SOLVER.WEIGHT_DECAY_EMBED = None
    # Batches whose gradients are averaged for one step of the optimizer; an iteration is such a
    # step. SOLVER.IMS_PER_BATCH images each, which is also what BatchFormerV2 attends over and what
    # the number of objects is counted in: a mean over these batches, not one batch of their size.
    cfg.SOLVER.GRADIENT_ACCUMULATION = 1
    # Evaluate the exponential moving average of the weights instead of the last ones. 0: off.
    cfg.SOLVER.EMA_DECAY = 0.0
