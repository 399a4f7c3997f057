//! What a driver can do with XDP, as the kernel itself says it: the generic netlink family `netdev`
//! (Linux 6.3).

use std::{collections::BTreeMap, io};

use rtnetlink::{
    packet_core::{
        DecodeError, DefaultNla, Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_ALIGNTO,
        NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
        NlasIterator, parse_string, parse_u16, parse_u32, parse_u64,
    },
    sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC},
};

// linux/genetlink.h
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
const CTRL_ATTR_MCAST_GRP_NAME: u16 = 1;
const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;
// linux/netdev.h
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
const NETDEV_XDP_ACT_NDO_XMIT: u64 = 4;
const NETDEV_XDP_ACT_NDO_XMIT_SG: u64 = 64;

/// The bits of `NETDEV_A_DEV_XDP_FEATURES`.
#[derive(Clone, Copy)]
pub(super) struct XdpFeatures(u64);

impl XdpFeatures {
    /// The driver sends frames that are redirected to it, as it is set up now.
    pub(super) fn transmit(self) -> bool {
        self.0 & NETDEV_XDP_ACT_NDO_XMIT != 0
    }

    /// Also frames in several pieces, which are larger than a page.
    pub(super) fn transmit_pieces(self) -> bool {
        self.transmit() && self.0 & NETDEV_XDP_ACT_NDO_XMIT_SG != 0
    }
}

/// The family, as this kernel numbers it.
pub(super) struct Netdev {
    family: u16,
    /// The multicast group that hears of changed features.
    pub(super) group: Option<u32>,
}

impl Netdev {
    /// `None` where the kernel does not know the family.
    pub(super) fn open() -> io::Result<Option<Netdev>> {
        let name = DefaultNla::new(CTRL_ATTR_FAMILY_NAME, b"netdev\0".to_vec());
        let mut attributes = vec![0; name.buffer_len()];
        name.emit(&mut attributes);
        let request = Generic { family: GENL_ID_CTRL, command: CTRL_CMD_GETFAMILY, attributes };
        let answers = match ask(request, NLM_F_ACK) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            answers => answers?,
        };
        Ok(answers.iter().find_map(|answer| {
            let family = parse_u16(&answer.attribute(CTRL_ATTR_FAMILY_ID)?).ok()?;
            let group = answer.attribute(CTRL_ATTR_MCAST_GROUPS).and_then(|groups| {
                NlasIterator::new(&groups).flatten().find_map(|group| {
                    let name = attribute(group.value(), CTRL_ATTR_MCAST_GRP_NAME)?;
                    let id = attribute(group.value(), CTRL_ATTR_MCAST_GRP_ID)?;
                    (parse_string(&name).ok()? == "mgmt").then(|| parse_u32(&id).ok())?
                })
            });
            Some(Netdev { family, group })
        }))
    }

    /// The features of every interface, by its index.
    pub(super) fn xdp_features(&self) -> io::Result<BTreeMap<u32, XdpFeatures>> {
        let request =
            Generic { family: self.family, command: NETDEV_CMD_DEV_GET, attributes: Vec::new() };
        let answers = ask(request, NLM_F_DUMP)?;
        let features = answers.iter().filter_map(|answer| {
            let index = parse_u32(&answer.attribute(NETDEV_A_DEV_IFINDEX)?).ok()?;
            let bits = parse_u64(&answer.attribute(NETDEV_A_DEV_XDP_FEATURES)?).ok()?;
            Some((index, XdpFeatures(bits)))
        });
        Ok(features.collect())
    }
}

/// Sends a request and reads its answers. The kernel answers within the call that sends, so this
/// does not wait.
///
/// Not through [`rtnetlink::proto`]: it takes a dump for over after the first message without
/// `NLM_F_MULTI`, which this family does not set.
fn ask(request: Generic, flags: u16) -> io::Result<Vec<Generic>> {
    let mut message = NetlinkMessage::from(request);
    message.header.flags = flags | NLM_F_REQUEST;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    let socket = Socket::new(NETLINK_GENERIC)?;
    socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
    let mut answers = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while !rest.is_empty() {
            let answer = NetlinkMessage::deserialize(rest).map_err(io::Error::other)?;
            let length = (answer.header.length as usize).next_multiple_of(NLMSG_ALIGNTO.into());
            rest = rest.get(length..).unwrap_or_default();
            match answer.payload {
                NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::Done(done) if done.code < 0 => {
                    return Err(io::Error::from_raw_os_error(-done.code));
                }
                NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(answers),
                _ => {}
            }
        }
    }
}

/// A generic netlink message of any family, its attributes as they are on the wire.
#[derive(Debug)]
struct Generic {
    family: u16,
    command: u8,
    attributes: Vec<u8>,
}

/// Length of `struct genlmsghdr`: command, version, 2 reserved bytes.
const HEADER: usize = 4;

impl Generic {
    fn attribute(&self, kind: u16) -> Option<Vec<u8>> {
        attribute(&self.attributes, kind)
    }
}

fn attribute(attributes: &[u8], kind: u16) -> Option<Vec<u8>> {
    let attribute = NlasIterator::new(attributes).flatten().find(|it| it.kind() == kind)?;
    Some(attribute.value().to_vec())
}

impl NetlinkSerializable for Generic {
    fn message_type(&self) -> u16 {
        self.family
    }

    fn buffer_len(&self) -> usize {
        HEADER + self.attributes.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer[..HEADER].copy_from_slice(&[self.command, 1, 0, 0]);
        buffer[HEADER..].copy_from_slice(&self.attributes);
    }
}

impl NetlinkDeserializable for Generic {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        match payload {
            [command, _, _, _, attributes @ ..] => Ok(Generic {
                family: header.message_type,
                command: *command,
                attributes: attributes.to_vec(),
            }),
            _ => Err(DecodeError::from("generic netlink message without header")),
        }
    }
}

impl From<Generic> for NetlinkPayload<Generic> {
    fn from(message: Generic) -> Self {
        NetlinkPayload::InnerMessage(message)
    }
}
