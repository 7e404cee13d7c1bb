"""What a repository of the Hugging Face Hub needs beside a package's files: its model card."""
