package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

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

// place is where a session runs. A connection never outlives it.
type place struct {
	session, node, password string
}

func placeOf(r *route) place { return place{r.id, r.node, r.password} }

// upstream is the way to one session at one place. A new assignment that leaves
// the container alone, because only limits changed, leaves its connections alone
// too; new ones carry the new generation, which the node checks.
type upstream struct {
	place
	generation atomic.Int64
	transport  *http.Transport
	ctx        context.Context // ends when the session has moved
	cancel     context.CancelFunc
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
	u.mu.Lock()
	defer u.mu.Unlock()
	generation := r.session.GetGeneration()
	up := u.byID[r.id]
	switch {
	case up == nil:
	case up.place == placeOf(r):
		up.generation.Store(max(generation, up.generation.Load()))
		return up
	case up.generation.Load() > generation:
		// The request looked its route up before the session moved on. Give
		// it a way that is closed already instead of tearing down the new one.
		old := u.make(r)
		old.close()
		return old
	default:
		up.close()
	}
	up = u.make(r)
	u.byID[r.id] = up
	return up
}

func (u *upstreams) make(r *route) *upstream {
	up := &upstream{place: placeOf(r)}
	up.generation.Store(r.session.GetGeneration())
	up.transport = u.transport(up)
	up.ctx, up.cancel = context.WithCancel(u.ctx)
	return up
}

// moved takes in a new assignment of a session, or its end (nil). Requests on
// what it has left behind end.
func (u *upstreams) moved(id string, now *route) {
	u.mu.Lock()
	defer u.mu.Unlock()
	up := u.byID[id]
	switch {
	case up == nil:
	case now != nil && now.running() && up.place == placeOf(now):
		up.generation.Store(max(now.session.GetGeneration(), up.generation.Load()))
	default:
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

func (u *upstreams) transport(up *upstream) *http.Transport {
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
			conn, err := u.dial(ctx, up, port)
			if err != nil {
				return nil, &dialError{place: up.place, port: port, err: err}
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

// dial connects, and waits a while for a node that is about to be ready for it:
// after a start of the gateway routes are known sooner than links stand, and
// after a new assignment sooner than the node has taken it in.
func (u *upstreams) dial(ctx context.Context, up *upstream, port uint16) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, u.linkWait+dialTimeout)
	defer cancel()
	giveUp := time.Now().Add(u.linkWait)
	for {
		conn, err := u.dialer.Dial(ctx, up.node, &linkv1.Target{Kind: &linkv1.Target_Session{Session: &linkv1.SessionTarget{
			SessionId: up.session, Generation: up.generation.Load(), Port: uint32(port),
		}}})
		notYet := errors.Is(err, link.ErrNoLink) || status.Code(err) == codes.FailedPrecondition
		if !notYet || time.Now().After(giveUp) {
			return conn, err
		}
		sleep(ctx, 50*time.Millisecond)
		if ctx.Err() != nil || up.ctx.Err() != nil {
			return nil, err
		}
	}
}

// dialTimeout bounds how long a linked node may take to connect.
const dialTimeout = 15 * time.Second

// dialError says that no byte of a request was sent.
type dialError struct {
	place
	port uint16
	err  error
}

func (e *dialError) Error() string {
	return fmt.Sprintf("connect to port %d of session %s on node %s: %v", e.port, e.session, e.node, e.err)
}
func (e *dialError) Unwrap() error { return e.err }
