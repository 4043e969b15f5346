//! Removes containers and volumes of an earlier run by name.

use anyhow::{Context, Result};
use testcontainers::bollard::errors::Error as DockerError;
use testcontainers::bollard::query_parameters::{RemoveContainerOptionsBuilder, RemoveVolumeOptionsBuilder};
use testcontainers::core::client::docker_client_instance;

/// Removes the container, running or not. Succeeds if there is none.
pub async fn remove_container(name: &str) -> Result<()> {
    let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
    let removed = docker_client_instance().await?.remove_container(name, Some(options)).await;
    fine_if_absent(removed).with_context(|| format!("cannot remove the container {name}"))
}

/// Removes the volume and all data in it. Succeeds if there is none.
pub async fn remove_volume(name: &str) -> Result<()> {
    let options = RemoveVolumeOptionsBuilder::new().build();
    let removed = docker_client_instance().await?.remove_volume(name, Some(options)).await;
    fine_if_absent(removed).with_context(|| format!("cannot remove the volume {name}"))
}

fn fine_if_absent(removed: Result<(), DockerError>) -> Result<(), DockerError> {
    match removed {
        Err(DockerError::DockerResponseServerError { status_code: 404, .. }) => Ok(()),
        other => other,
    }
}
