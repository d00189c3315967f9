"""The copy of the folder that a person gives with a job."""
