//! UDP sockets with buffers that hold a burst.

use std::{io, net::SocketAddr, sync::Arc};

use quinn::{Endpoint, EndpointConfig, ServerConfig, TokioRuntime};
use quinn_proto::HashedConnectionIdGenerator;
use ring::hmac;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{error::TransportError, identity::ResetKey};

/// Asked of the system for each direction, bytes; it may give less. Small buffers show as loss on
/// fast local links.
const SOCKET_BUFFER_BYTES: usize = 2 << 20;

pub(crate) fn udp(addr: SocketAddr) -> Result<std::net::UdpSocket, TransportError> {
    let make = || -> io::Result<std::net::UdpSocket> {
        let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
        // Best effort: the link works with less.
        let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
        let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
        socket.set_nonblocking(true)?;
        socket.bind(&addr.into())?;
        Ok(socket.into())
    };
    make().map_err(|e| TransportError::Bind { addr, reason: e.to_string() })
}

/// An endpoint for dialing.
pub(crate) fn client(addr: SocketAddr) -> Result<Endpoint, TransportError> {
    endpoint(addr, EndpointConfig::default(), None)
}

/// An endpoint that accepts. Packets of connections that an earlier process of the node had are answered
/// with a stateless reset (RFC 9000, section 10.3), which ends them at once instead of after the idle
/// timeout: its tokens, and the check that connection ids are the node's own, come from `reset_key`.
pub(crate) fn server(addr: SocketAddr, config: ServerConfig, reset_key: &ResetKey) -> Result<Endpoint, TransportError> {
    let mut ends = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &reset_key.tokens)));
    let ids = reset_key.ids;
    ends.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids)));
    endpoint(addr, ends, Some(config))
}

fn endpoint(addr: SocketAddr, ends: EndpointConfig, server: Option<ServerConfig>) -> Result<Endpoint, TransportError> {
    let socket = udp(addr)?;
    Endpoint::new(ends, server, socket, Arc::new(TokioRuntime))
        .map_err(|e| TransportError::Bind { addr, reason: e.to_string() })
}
