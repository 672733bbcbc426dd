"""Measures of features and of what they separate: tensors in, one float out, float64 inside."""

from alignlab.metrics.cka import Neighbours as Neighbours
from alignlab.metrics.cka import cka as cka
from alignlab.metrics.cka import cknna as cknna
from alignlab.metrics.cka import cknna_of as cknna_of
from alignlab.metrics.colour import colourfulness as colourfulness
from alignlab.metrics.colour import mean_lab as mean_lab
from alignlab.metrics.colour import rms_contrast as rms_contrast
from alignlab.metrics.copy_paste import copy_paste as copy_paste
from alignlab.metrics.frechet import frechet_distance as frechet_distance
from alignlab.metrics.frequency import frequency_bands as frequency_bands
from alignlab.metrics.frequency import temporal_stability as temporal_stability
from alignlab.metrics.iicr import iicr as iicr
from alignlab.metrics.retrieval import retrieval_chance as retrieval_chance
from alignlab.metrics.retrieval import subject_retrieval as subject_retrieval
from alignlab.metrics.retrieval import teacher_retrieval as teacher_retrieval
from alignlab.metrics.separability import cross_subject_cosine as cross_subject_cosine
from alignlab.metrics.separability import silhouette as silhouette
from alignlab.metrics.video import motion_amplitude as motion_amplitude
from alignlab.metrics.video import temporal_flickering as temporal_flickering
