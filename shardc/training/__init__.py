"""What a training loop needs beside the model: each rank's rows of a data set, and how fast a step is."""
