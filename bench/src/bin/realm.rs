//! realm (<https://github.com/zhboner/realm>), one of the contenders, which crates.io has as a library
//! alone: `realm [tcp|udp LISTEN TO]...`. One thread, with the defaults of realm's own program.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail};
use realm_core::endpoint::{BindOpts, ConnectOpts, Endpoint, RemoteAddr};
use realm_core::{tcp::run_tcp, udp::run_udp};
use tokio::task::JoinSet;

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (forwards, []) = words.as_chunks::<3>() else {
        bail!("usage: realm [tcp|udp LISTEN TO]...")
    };
    runtime.block_on(async {
        let mut relays = JoinSet::new();
        for [transport, listen, to] in forwards {
            let endpoint = endpoint(listen, to)?;
            match transport.as_str() {
                "tcp" => relays.spawn(run_tcp(endpoint)),
                "udp" => relays.spawn(run_udp(endpoint)),
                other => bail!("{other} is neither tcp nor udp"),
            };
        }
        while let Some(ended) = relays.join_next().await {
            ended??;
        }
        Ok(())
    })
}

fn endpoint(listen: &str, to: &str) -> Result<Endpoint> {
    let address = |text: &str| -> Result<SocketAddr> {
        text.parse().with_context(|| format!("{text} is no ADDRESS:PORT"))
    };
    Ok(Endpoint {
        laddr: address(listen)?,
        raddr: RemoteAddr::SocketAddr(address(to)?),
        bind_opts: BindOpts::default(),
        // Seconds. UDP clients are forgotten after as long a silence as with the other proxies.
        conn_opts: ConnectOpts {
            connect_timeout: 5,
            associate_timeout: 10,
            tcp_keepalive: 15,
            tcp_keepalive_probe: 3,
            ..ConnectOpts::default()
        },
        extra_raddrs: Vec::new(),
    })
}
