"""Parts of `train_recall_model.py`: data, model, training and scoring of the shipped model."""
