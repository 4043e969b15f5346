use crate::port::free_port;
use anyhow::Result;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// A TCP proxy between clients and a server. Ends when dropped.
///
/// It can hold back what clients send, and make connections dead without a FIN or RST, as a network that loses every packet
/// does.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    gate: watch::Sender<Gate>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Gate {
    held: bool,
    /// Connections from before its last increment are dead.
    generation: u32,
}

impl Proxy {
    /// Starts a proxy for `server`, a `host:port`.
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

    /// The address of the proxy.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Holds back what clients send from now on. Replies still pass.
    pub fn hold(&self) {
        self.gate.send_modify(|gate| gate.held = true);
    }

    /// Forwards what was held back.
    pub fn release(&self) {
        self.gate.send_modify(|gate| gate.held = false);
    }

    /// Makes the open connections dead: they stay open without any byte. New connections work.
    pub fn abandon(&self) {
        self.gate.send_modify(|gate| gate.generation += 1);
    }
}

async fn carry(client: TcpStream, server: String, mut gate: watch::Receiver<Gate>) -> Result<()> {
    let generation = gate.borrow().generation;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = TcpStream::connect(server).await?.into_split();
    let mut dead = gate.clone();
    let replies = async move {
        let died = async { dead.wait_for(|gate| gate.generation > generation).await.is_ok() };
        tokio::select! {
            ended = copy(&mut from_server, &mut to_client) => drop(ended),
            _ = died => std::future::pending().await,
        }
    };
    let requests = async move {
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
        () = replies => Ok(()),
        ended = requests => ended,
    }
}
