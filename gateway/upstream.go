package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	linkv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/link/v1"

	"github.com/cloudcode-dev/cloudcode/internal/link"
)

// Dialer connects to targets on nodes. *link.Hub is one.
type Dialer interface {
	// Dial returns link.ErrNoLink when the node is not connected, and a gRPC
	// status when the node refuses.
	Dial(ctx context.Context, nodeID string, target *linkv1.Target) (net.Conn, error)
}

var _ Dialer = (*link.Hub)(nil)

// upstreamKey is what a connection to a session is good for. The generation is
// the fence: a connection never outlives the assignment that it was made for.
type upstreamKey struct {
	session    string
	generation int64
	node       string
	password   string
}

func keyOf(r *route) upstreamKey {
	return upstreamKey{r.id, r.session.GetGeneration(), r.node, r.password}
}

// upstream is the way to one generation of one session.
type upstream struct {
	key       upstreamKey
	transport *http.Transport
	ctx       context.Context // ends when the route has changed
	cancel    context.CancelFunc
}

// upstreams holds one upstream for each session that had traffic.
type upstreams struct {
	dialer   Dialer
	linkWait time.Duration
	ctx      context.Context // ends all

	mu   sync.Mutex
	byID map[string]*upstream
}

func newUpstreams(ctx context.Context, dialer Dialer, linkWait time.Duration) *upstreams {
	return &upstreams{dialer: dialer, linkWait: linkWait, ctx: ctx, byID: map[string]*upstream{}}
}

// get returns the upstream for a route, making it if there is none.
func (u *upstreams) get(r *route) *upstream {
	key := keyOf(r)
	u.mu.Lock()
	defer u.mu.Unlock()
	up := u.byID[r.id]
	if up != nil && up.key == key {
		return up
	}
	if up != nil && up.key.generation > key.generation {
		// The request looked its route up before the session moved on. Give
		// it a way that is closed already instead of tearing down the new one.
		up = &upstream{key: key, transport: u.transport(key)}
		up.ctx, up.cancel = context.WithCancel(u.ctx)
		up.close()
		return up
	}
	if up != nil {
		up.close()
	}
	up = &upstream{key: key, transport: u.transport(key)}
	up.ctx, up.cancel = context.WithCancel(u.ctx)
	u.byID[r.id] = up
	return up
}

// moved closes what leads to an older assignment; requests on it end.
func (u *upstreams) moved(id string, now *route) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if up := u.byID[id]; up != nil && (now == nil || up.key != keyOf(now)) {
		up.close()
		delete(u.byID, id)
	}
}

// closeAll ends every connection.
func (u *upstreams) closeAll() {
	u.mu.Lock()
	defer u.mu.Unlock()
	for id, up := range u.byID {
		up.close()
		delete(u.byID, id)
	}
}

func (up *upstream) close() {
	up.cancel()
	up.transport.CloseIdleConnections()
}

func (u *upstreams) transport(key upstreamKey) *http.Transport {
	return &http.Transport{
		// No response timeouts: a prompt answers when the model is done.
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			_, portText, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			port, ok := parsePort(portText)
			if !ok {
				return nil, fmt.Errorf("%q is no port", portText)
			}
			conn, err := u.dial(ctx, key, port)
			if err != nil {
				return nil, &dialError{key: key, port: port, err: err}
			}
			return conn, nil
		},
		DisableCompression:    true, // bytes go through as they are
		MaxIdleConns:          64,
		MaxIdleConnsPerHost:   16,
		IdleConnTimeout:       30 * time.Second,
		ExpectContinueTimeout: time.Second,
	}
}

// dial connects, and waits a while for a node that is about to link: after a
// start of the gateway, routes are known sooner than links stand.
func (u *upstreams) dial(ctx context.Context, key upstreamKey, port uint16) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, u.linkWait+dialTimeout)
	defer cancel()
	target := &linkv1.Target{Kind: &linkv1.Target_Session{Session: &linkv1.SessionTarget{
		SessionId: key.session, Generation: key.generation, Port: uint32(port),
	}}}
	giveUp := time.Now().Add(u.linkWait)
	for {
		conn, err := u.dialer.Dial(ctx, key.node, target)
		if err == nil || !errors.Is(err, link.ErrNoLink) || time.Now().After(giveUp) {
			return conn, err
		}
		sleep(ctx, 50*time.Millisecond)
		if ctx.Err() != nil {
			return nil, err
		}
	}
}

// dialTimeout bounds how long a linked node may take to connect.
const dialTimeout = 15 * time.Second

// dialError says that no byte of a request was sent.
type dialError struct {
	key  upstreamKey
	port uint16
	err  error
}

func (e *dialError) Error() string {
	return fmt.Sprintf("connect to port %d of session %s on node %s: %v", e.port, e.key.session, e.key.node, e.err)
}
func (e *dialError) Unwrap() error { return e.err }
