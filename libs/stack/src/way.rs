use crate::free_port;
use anyhow::Result;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// A way to a server on which a test can hold up what clients send, or let connections die without a word, as a network
/// that loses every packet does. Ends when dropped.
#[derive(Debug)]
pub struct Way {
    address: SocketAddr,
    gate: watch::Sender<Gate>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Gate {
    held: bool,
    /// Connections made before it last rose are dead.
    generation: u32,
}

impl Way {
    /// A new way to `server`, a `host:port`.
    pub async fn to(server: &str) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", free_port())).await?;
        let address = listener.local_addr()?;
        let gate = watch::Sender::new(Gate::default());
        let (server, mut view) = (server.to_owned(), gate.subscribe());
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    accepted = listener.accept() => if let Ok((client, _)) = accepted {
                        tokio::spawn(carry(client, server.clone(), view.clone()));
                    },
                    ended = view.changed() => if ended.is_err() { return },
                }
            }
        });
        Ok(Self { address, gate })
    }

    /// Where the way begins.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on what clients send waits; answers still pass.
    pub fn hold(&self) {
        self.gate.send_modify(|gate| gate.held = true);
    }

    /// What was held up arrives.
    pub fn release(&self) {
        self.gate.send_modify(|gate| gate.held = false);
    }

    /// The connections there are stay open and never carry another byte; new ones work.
    pub fn abandon(&self) {
        self.gate.send_modify(|gate| gate.generation += 1);
    }
}

async fn carry(client: TcpStream, server: String, mut gate: watch::Receiver<Gate>) -> Result<()> {
    let generation = gate.borrow().generation;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = TcpStream::connect(server).await?.into_split();
    let mut dead = gate.clone();
    let answers = async move {
        let died = async { dead.wait_for(|gate| gate.generation > generation).await.is_ok() };
        tokio::select! {
            ended = copy(&mut from_server, &mut to_client) => drop(ended),
            _ = died => std::future::pending().await,
        }
    };
    let questions = async move {
        let mut buffer = vec![0; 1 << 16];
        loop {
            let length = from_client.read(&mut buffer).await?;
            let seen = *gate.wait_for(|gate| !gate.held || gate.generation > generation).await?;
            if seen.generation > generation {
                std::future::pending::<()>().await;
            }
            if length == 0 {
                return anyhow::Ok(());
            }
            to_server.write_all(&buffer[..length]).await?;
        }
    };
    tokio::select! {
        () = answers => Ok(()),
        asked = questions => asked,
    }
}
