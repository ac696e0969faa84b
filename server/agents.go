package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/cloudcode-dev/cloudcode/internal/link"
	"github.com/cloudcode-dev/cloudcode/internal/pki"
	linkv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/link/v1"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

// agents reaches node daemons over the links that they keep open: one gRPC
// connection per node, made when it is first needed.
type agents struct {
	hub *link.Hub

	mu     sync.Mutex
	conns  map[string]*grpc.ClientConn
	closed bool
}

func newAgents(hub *link.Hub) *agents {
	return &agents{hub: hub, conns: map[string]*grpc.ClientConn{}}
}

// Agent implements api.Agents.
func (a *agents) Agent(_ context.Context, nodeID string) (nodev1.AgentServiceClient, error) {
	// Told at once; gRPC would first wait out its back-off.
	if !a.hub.Linked(nodeID) {
		return nil, fmt.Errorf("%w: node %s has no connection to this server", fleet.ErrUnavailable, nodeID)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil, fmt.Errorf("%w: the server is stopping", fleet.ErrUnavailable)
	}
	conn, ok := a.conns[nodeID]
	if !ok {
		var err error
		conn, err = grpc.NewClient("passthrough:///"+nodeID,
			// The link below is TLS with certificates on both ends.
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(pki.MaxMessage)),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				return a.hub.Dial(ctx, nodeID, &linkv1.Target{Kind: &linkv1.Target_Agent{Agent: &linkv1.AgentTarget{}}})
			}))
		if err != nil {
			return nil, err
		}
		a.conns[nodeID] = conn
	}
	// The node may have come back since the last try.
	conn.ResetConnectBackoff()
	return nodev1.NewAgentServiceClient(conn), nil
}

func (a *agents) close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	var errs []error
	for _, c := range a.conns {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}
