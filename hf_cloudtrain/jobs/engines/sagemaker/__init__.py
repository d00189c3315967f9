"""TODO room sagemaker."""
