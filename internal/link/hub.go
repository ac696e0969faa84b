// Package link lets a server or gateway reach nodes that only dial out. A node
// keeps one control stream open to each hub; the hub asks for a connection over
// it, and the node answers with one gRPC stream for that connection alone:
// several connections inside one stream would wait for one another.
package link

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	linkv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/link/v1"
)

// ErrNoLink says that a node is not connected, or ended its link before it answered.
var ErrNoLink = errors.New("node is not linked")

// Identify returns the id of the node that calls.
type Identify func(ctx context.Context) (nodeID string, err error)

// Hub is the side that wants to reach nodes. It serves linkv1.LinkService.
type Hub struct {
	linkv1.UnimplementedLinkServiceServer
	identify Identify
	log      *slog.Logger

	mu      sync.Mutex
	closed  chan struct{}
	nodes   map[string]*control
	pending map[string]*pendingDial
}

// control is one node's control stream.
type control struct {
	node  string
	dials chan *linkv1.Dial
	gone  chan struct{} // closed when the stream has ended or was replaced
	once  sync.Once
}

func (c *control) end() { c.once.Do(func() { close(c.gone) }) }

// pendingDial waits for its Connect.
type pendingDial struct {
	control   *control
	answer    chan dialAnswer // holds one
	abandoned bool            // guarded by Hub.mu
}

type dialAnswer struct {
	conn net.Conn
	err  error
}

// NewHub returns a hub. Register it on a gRPC server, and Close it before that
// server stops.
func NewHub(identify Identify, log *slog.Logger) *Hub {
	return &Hub{
		identify: identify, log: log, closed: make(chan struct{}),
		nodes: map[string]*control{}, pending: map[string]*pendingDial{},
	}
}

// Dial connects to a target on a node. Returns ErrNoLink when the node is not
// linked, and the node's own error (a gRPC status) when it refuses.
func (h *Hub) Dial(ctx context.Context, nodeID string, target *linkv1.Target) (net.Conn, error) {
	id := rand.Text()
	h.mu.Lock()
	c, ok := h.nodes[nodeID]
	if !ok {
		h.mu.Unlock()
		return nil, fmt.Errorf("%w: %s", ErrNoLink, nodeID)
	}
	p := &pendingDial{control: c, answer: make(chan dialAnswer, 1)}
	h.pending[id] = p
	h.mu.Unlock()
	answered := false
	defer func() {
		if !answered {
			h.abandon(id, p)
		}
	}()

	select {
	case c.dials <- &linkv1.Dial{ConnectionId: id, Target: target}:
	case <-c.gone:
		return nil, fmt.Errorf("%w: %s", ErrNoLink, nodeID)
	case <-ctx.Done():
		return nil, fmt.Errorf("dial %s: %w", nodeID, ctx.Err())
	}
	select {
	case a := <-p.answer:
		answered = true
		return a.conn, a.err
	case <-c.gone:
		return nil, fmt.Errorf("%w: %s", ErrNoLink, nodeID)
	case <-ctx.Done():
		return nil, fmt.Errorf("dial %s: %w", nodeID, ctx.Err())
	}
}

// abandon forgets a dial, and closes a connection that came for it meanwhile.
func (h *Hub) abandon(id string, p *pendingDial) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.pending, id)
	p.abandoned = true
	select {
	case a := <-p.answer:
		if a.conn != nil {
			go a.conn.Close() // waits for its stream, which may want the lock
		}
	default:
	}
}

// answer hands a connection to whoever dialled, if he still waits.
func (h *Hub) answer(p *pendingDial, a dialAnswer) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p.abandoned {
		return false
	}
	p.answer <- a
	return true
}

// take returns the dial that a node answers, once.
func (h *Hub) take(node, id string) (*pendingDial, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p, ok := h.pending[id]
	if !ok || p.control.node != node {
		return nil, false
	}
	delete(h.pending, id)
	return p, true
}

// Linked reports whether a node has a control stream here.
func (h *Hub) Linked(nodeID string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, ok := h.nodes[nodeID]
	return ok
}

// Close ends all links and connections.
func (h *Hub) Close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	select {
	case <-h.closed:
	default:
		close(h.closed)
	}
}

// Control implements linkv1.LinkServiceServer. A newer stream of the same node
// replaces an older one; connections that are open stay open.
func (h *Hub) Control(s grpc.BidiStreamingServer[linkv1.ControlRequest, linkv1.ControlResponse]) error {
	node, err := h.identify(s.Context())
	if err != nil {
		return err
	}
	c := &control{node: node, dials: make(chan *linkv1.Dial), gone: make(chan struct{})}
	h.mu.Lock()
	if old := h.nodes[node]; old != nil {
		old.end()
	}
	h.nodes[node] = c
	h.mu.Unlock()
	h.log.Debug("node linked", "node", node)
	defer func() {
		c.end()
		h.mu.Lock()
		if h.nodes[node] == c {
			delete(h.nodes, node)
		}
		h.mu.Unlock()
		h.log.Debug("node unlinked", "node", node)
	}()
	// Headers at once: they tell the node that the link stands.
	if err := s.SendHeader(nil); err != nil {
		return err
	}

	failures := make(chan struct{})
	go func() { // ends with the stream, which ends when we return
		defer close(failures)
		for {
			req, err := s.Recv()
			if err != nil {
				return
			}
			if f := req.GetFailure(); f != nil {
				if p, ok := h.take(node, f.GetConnectionId()); ok {
					h.answer(p, dialAnswer{err: status.Error(codes.Code(f.GetCode()), f.GetMessage())})
				}
			}
		}
	}()
	for {
		select {
		case d := <-c.dials:
			if err := s.Send(&linkv1.ControlResponse{Dial: d}); err != nil {
				return err
			}
		case <-failures:
			return nil
		case <-c.gone:
			return status.Error(codes.Aborted, "replaced by a newer link of the same node")
		case <-h.closed:
			return status.Error(codes.Unavailable, "hub is closing")
		case <-s.Context().Done():
			return s.Context().Err()
		}
	}
}

// Connect implements linkv1.LinkServiceServer.
func (h *Hub) Connect(s grpc.BidiStreamingServer[linkv1.ConnectRequest, linkv1.ConnectResponse]) error {
	node, err := h.identify(s.Context())
	if err != nil {
		return err
	}
	first, err := s.Recv()
	if err != nil {
		return err
	}
	p, ok := h.take(node, first.GetConnectionId())
	if !ok {
		return status.Error(codes.NotFound, "nobody waits for this connection any more")
	}
	st := &hubStream{s: s, over: make(chan struct{})}
	c := newConn(st, addr("hub"), addr(node))
	if !h.answer(p, dialAnswer{conn: c}) {
		// Its reader would wait for somebody to take what came already. Close waits
		// for the stream, which ends when we return.
		go c.Close()
		return status.Error(codes.NotFound, "nobody waits for this connection any more")
	}
	select {
	case <-st.over: // our side closed the connection
	case <-h.closed:
	case <-s.Context().Done():
	}
	return nil
}

type hubStream struct {
	s    grpc.BidiStreamingServer[linkv1.ConnectRequest, linkv1.ConnectResponse]
	over chan struct{}
	once sync.Once
}

func (h *hubStream) send(data []byte, fin bool) error {
	frame := &linkv1.ConnectResponse{Frame: &linkv1.ConnectResponse_Data{Data: data}}
	if fin {
		frame.Frame = &linkv1.ConnectResponse_Fin{Fin: true}
	}
	return h.s.Send(frame)
}

func (h *hubStream) recv() ([]byte, error) {
	for {
		req, err := h.s.Recv()
		switch {
		case err != nil:
			return nil, eof(err)
		case req.GetFin():
			return nil, io.EOF
		case len(req.GetData()) > 0:
			return req.GetData(), nil
		}
	}
}

func (h *hubStream) ended() <-chan struct{} { return h.s.Context().Done() }

// settle: our last frame is sent before the handler's status, in order.
func (h *hubStream) settle() { h.abort() }

func (h *hubStream) abort() { h.once.Do(func() { close(h.over) }) }

// eof turns the regular ends of a stream into io.EOF, as a TCP connection has it.
func eof(err error) error {
	if errors.Is(err, io.EOF) || status.Code(err) == codes.OK {
		return io.EOF
	}
	return fmt.Errorf("link: %w", err)
}
