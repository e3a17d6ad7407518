//! UDP sockets with buffers that hold a burst.

use std::{io, net::SocketAddr, sync::Arc};

use quinn::{Endpoint, EndpointConfig, ServerConfig, TokioRuntime};
use socket2::{Domain, Protocol, Socket, Type};

use crate::error::TransportError;

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

pub(crate) fn endpoint(addr: SocketAddr, server: Option<ServerConfig>) -> Result<Endpoint, TransportError> {
    let socket = udp(addr)?;
    Endpoint::new(EndpointConfig::default(), server, socket, Arc::new(TokioRuntime))
        .map_err(|e| TransportError::Bind { addr, reason: e.to_string() })
}
