# For a JupyterHub, or alone: docker build -t vit-course . && docker run -p 8888:8888 vit-course
# JupyterLab comes with the base image; the rest has the versions that Binder has, with CPU builds of torch.
FROM quay.io/jupyter/minimal-notebook:python-3.13

# first, so that a changed lesson does not install torch again
COPY binder/requirements.txt requirements.txt
RUN pip install --no-cache-dir -r requirements.txt nbgitpuller==1.3.0 && rm -f requirements.txt

# not in the home folder, which a hub hides under the student's own volume
COPY --chown=${NB_UID}:${NB_GID} . /opt/vit-course
RUN pip install --no-cache-dir --no-deps --editable /opt/vit-course && cp -r /opt/vit-course/notebooks "${HOME}/notebooks"

# as many threads as the container has cores
ENTRYPOINT ["tini", "-g", "--", "start.sh", "/opt/vit-course/binder/start"]
# an ENTRYPOINT clears the base image's own command
CMD ["start-notebook.py"]
