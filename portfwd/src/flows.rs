//! Flows in the words of users: how many, for how long, and which of them somebody asks for.
//!
//! Nothing here asks the system anything.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use portfwd_ebpf::packet::{TCP, UDP};
use portfwd_ebpf::table::{FlowHalf, Jiffies, Lines, Tally};
use serde::{Deserialize, Serialize};

use crate::rule::{Invalid, invalid};

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// What the flow tables are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowSettings {
    /// How many established flows there may be, of each address family.
    pub size: u32,
    pub timeouts: Timeouts,
}

impl Default for FlowSettings {
    fn default() -> Self {
        FlowSettings { size: 65_536, timeouts: Timeouts::default() }
    }
}

/// For how long flows may be idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    pub udp: Duration,
    pub udp_unanswered: Duration,
    /// While the connection is established.
    pub tcp: Duration,
    /// While it opens or closes.
    pub tcp_transitory: Duration,
}

/// The shortest that RFC 4787 (REQ-5) and RFC 5382 (REQ-5) allow; for answered UDP what the former
/// recommends.
impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            udp: Duration::from_secs(300),
            udp_unanswered: Duration::from_secs(120),
            tcp: Duration::from_secs(7440),
            tcp_transitory: Duration::from_secs(240),
        }
    }
}

impl Timeouts {
    /// For how long any flow may be idle.
    pub fn shortest(&self) -> Duration {
        let Self { udp, udp_unanswered, tcp, tcp_transitory } = *self;
        udp.min(udp_unanswered).min(tcp).min(tcp_transitory)
    }

    /// For how long a flow in this state may be idle. What is not TCP is like UDP.
    pub fn limit(&self, protocol: u8, state: State) -> Duration {
        match (protocol, state) {
            (TCP, State::Established) => self.tcp,
            (TCP, _) => self.tcp_transitory,
            (_, State::New) => self.udp_unanswered,
            _ => self.udp,
        }
    }
}

/// How far a flow has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The backend has not answered.
    New,
    /// It has; the client has not spoken since.
    Answered,
    Established,
    /// FIN from both sides, or RST.
    Closing,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::New => "new",
            State::Answered => "answered",
            State::Established => "established",
            State::Closing => "closing",
        })
    }
}

/// A flow as the tables have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowRow {
    pub protocol: u8,
    pub client: SocketAddr,
    /// Where the client sends to.
    pub listen: SocketAddr,
    /// The client as the backend sees it.
    pub source: SocketAddr,
    pub backend: SocketAddr,
    /// The rule's row of the counters.
    pub counter: u32,
    pub state: State,
    pub created: Jiffies,
    /// The last packet of either direction.
    pub last: Jiffies,
    pub forward: Tally,
    pub reply: Tally,
}

/// How protocols are called; those without a name have their number.
pub fn protocol_name(protocol: u8) -> Cow<'static, str> {
    match protocol {
        TCP => "tcp".into(),
        UDP => "udp".into(),
        ICMP => "icmp".into(),
        ICMPV6 => "icmpv6".into(),
        number => number.to_string().into(),
    }
}

/// What flow tables of this size take of the kernel's memory at most, in bytes: where rules of both
/// families keep flows. It is taken at once.
pub fn memory(size: u32) -> u64 {
    /// Of an entry on probation, for the kernel.
    const HEADER: u64 = 48;
    let established = u64::from(homes(size));
    let probation = u64::from(probation(size));
    let family = |half: usize, key: u64, candidate: u64| {
        established * half as u64
            + probation * (HEADER + key + candidate)
            + 16 * probation.next_power_of_two()
    };
    family(size_of::<Lines<FlowHalf<4>>>(), 16, 80)
        + family(size_of::<Lines<FlowHalf<16>>>(), 40, 104)
}

/// How many [homes](portfwd_ebpf::flow_table) a table for so many flows has, each of which has an entry for
/// each direction: filled to three quarters, all but one in several hundred find a place.
pub fn homes(size: u32) -> u32 {
    (u64::from(size) * 2 * 4 / 3).clamp(1, u64::from(u32::MAX / 2)) as u32
}

/// How many flows may be on probation beside `size` established ones. Small tables of this kind lose
/// entries early: each CPU keeps some for itself.
pub fn probation(size: u32) -> u32 {
    (size / 2).max(16_384)
}

/// Which flows somebody asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Those of the rule with this name.
    pub rule: Option<String>,
    pub client: Option<Clients>,
}

impl Filter {
    /// What [`query`](Self::query) made.
    ///
    /// # Errors
    ///
    /// A filter that there is not, or a client that is none.
    pub fn from_query(query: &str) -> Result<Self, Invalid> {
        let mut filter = Filter::default();
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            match key.as_ref() {
                "rule" if filter.rule.is_none() => filter.rule = Some(value.into_owned()),
                "client" if filter.client.is_none() => filter.client = Some(value.parse()?),
                "rule" | "client" => return invalid!("{key} is there twice; write it once"),
                _ => {
                    return invalid!(
                        "there is no filter {key:?}; write rule=NAME or client=ADDRESS"
                    );
                }
            }
        }
        Ok(filter)
    }

    /// The filter as the query of a URL; nothing if it keeps every flow.
    pub fn query(&self) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        if let Some(rule) = &self.rule {
            query.append_pair("rule", rule);
        }
        if let Some(client) = &self.client {
            query.append_pair("client", &client.to_string());
        }
        query.finish()
    }
}

/// An address, or all of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clients(IpNet);

impl Clients {
    /// Whether `address` is one of them.
    pub fn contain(&self, address: IpAddr) -> bool {
        self.0.contains(&address)
    }
}

impl FromStr for Clients {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Clients(address.to_canonical().into()));
        }
        match text.parse::<IpNet>() {
            Ok(network) => Ok(Clients(network.trunc())),
            Err(_) => invalid!(
                "{text:?} is neither an address nor a network; write one, as in 203.0.113.7 or \
                 203.0.113.0/24"
            ),
        }
    }
}

impl fmt::Display for Clients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_flow_may_be_idle_as_its_state_allows() {
        let timeouts = Timeouts::default();
        let seconds = |protocol| {
            [State::New, State::Answered, State::Established, State::Closing]
                .map(|state| timeouts.limit(protocol, state).as_secs())
        };
        assert_eq!(seconds(UDP), [120, 300, 300, 300]);
        assert_eq!(seconds(TCP), [240, 240, 7440, 240]);
        assert_eq!(seconds(47), seconds(UDP));
    }

    #[test]
    fn protocols_have_names_or_numbers() {
        assert_eq!([6, 17, 1, 58, 47].map(protocol_name), ["tcp", "udp", "icmp", "icmpv6", "47"]);
    }

    #[test]
    fn memory_grows_with_the_flows() {
        // Eight thirds of an entry of 64 and one of 128 bytes, half of one of 144 and one of 192, and half
        // of two buckets of 16 bytes.
        let established = (3 << 20) * 2 * 4 / 3 * (64 + 128);
        assert_eq!(memory(3 << 20), established + (3 << 19) * (144 + 192) + 2 * 16 * (2 << 20));
        assert!(memory(1024) > 5 << 20, "probation is never small");
    }

    #[test]
    fn clients_are_addresses_or_networks() {
        let contain = |clients: &str, address: &str| {
            clients.parse::<Clients>().unwrap().contain(address.parse().unwrap())
        };
        assert!(contain("203.0.113.7", "203.0.113.7") && !contain("203.0.113.7", "203.0.113.8"));
        assert!(contain("203.0.113.7/24", "203.0.113.8"));
        assert!(contain("0.0.0.0/0", "203.0.113.8") && !contain("0.0.0.0/0", "2001:db8::1"));
        assert!(contain("2001:db8::/32", "2001:db8::1") && !contain("::/0", "203.0.113.8"));
        assert!(contain("::ffff:203.0.113.7", "203.0.113.7"));
        for text in ["", "a", "203.0.113.7/33", "203.0.113", "203.0.113.7:80", "[::1]", "::/129"] {
            assert_eq!(
                text.parse::<Clients>().unwrap_err().to_string(),
                format!(
                    "{text:?} is neither an address nor a network; write one, as in 203.0.113.7 or 203.0.113.0/24"
                )
            );
        }
    }

    #[test]
    fn bad_queries_are_refused() {
        assert_eq!(Filter::from_query(""), Ok(Filter::default()));
        assert_eq!(
            Filter::from_query("rule=a&port=1").unwrap_err().to_string(),
            "there is no filter \"port\"; write rule=NAME or client=ADDRESS"
        );
        assert!(
            Filter::from_query("client=x").unwrap_err().to_string().starts_with("\"x\" is nei")
        );
    }

    proptest! {
        #[test]
        fn a_filter_survives_its_query(
            rule in proptest::option::of(".*"),
            client in proptest::option::of((any::<[u8; 16]>(), 0..=128u8)),
        ) {
            let clients = |(address, bits)| {
                format!("{}/{bits}", IpAddr::from(address)).parse::<Clients>().unwrap()
            };
            let filter = Filter { rule, client: client.map(clients) };
            let query = filter.query();
            prop_assert!(query.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#'));
            prop_assert_eq!(Filter::from_query(&query), Ok(filter));
        }

        #[test]
        fn no_query_panics(text in ".*", query in "(rule|client|x)?=?[0-9a-f:.%/&]{0,20}") {
            for text in [text, query] {
                if let Err(Invalid(message)) = Filter::from_query(&text) {
                    prop_assert!(!message.contains('\n') && message.contains("; "), "{}", message);
                }
            }
        }
    }
}
