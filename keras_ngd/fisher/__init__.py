"""The Fisher matrix of labels that are drawn from the model: which rows, which gradients, and likelihoods of losses."""

from keras_ngd.fisher.known_losses import known
from keras_ngd.fisher.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood", "known"]
