package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	linkv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/link/v1"
)

// dialTimeout bounds how long a node tries to reach a target.
const dialTimeout = 10 * time.Second

// settleTimeout bounds how long a connection that has ended regularly waits for a
// slow reader on the other side.
const settleTimeout = 5 * time.Minute

// Dialer connects to a target on this node. Its errors reach whoever asked:
// gRPC statuses as they are, others as UNKNOWN.
type Dialer func(ctx context.Context, target *linkv1.Target) (net.Conn, error)

// Keep holds a link to one hub until ctx ends: it connects, serves, and connects
// again with back-off. linked, if not nil, is told when the link stands or fell.
func Keep(ctx context.Context, hub grpc.ClientConnInterface, dial Dialer, log *slog.Logger, linked func(bool)) {
	const first, longest = 100 * time.Millisecond, 5 * time.Second
	backoff := first
	var connections sync.WaitGroup
	defer connections.Wait()
	for ctx.Err() == nil {
		stood := false
		err := serve(ctx, hub, dial, &connections, func() {
			stood = true
			if linked != nil {
				linked(true)
			}
		})
		if ctx.Err() != nil {
			return
		}
		if stood {
			backoff = first
			if linked != nil {
				linked(false)
			}
		}
		log.Debug("link ended", "error", err, "retry_in", backoff)
		select {
		case <-time.After(backoff/2 + rand.N(backoff/2+1)):
		case <-ctx.Done():
		}
		backoff = min(2*backoff, longest)
	}
}

// serve holds one control stream and every connection asked for over it. The
// connections outlive the control stream, but not ctx and not the call.
func serve(ctx context.Context, hub grpc.ClientConnInterface, dial Dialer, wg *sync.WaitGroup, up func()) error {
	client := linkv1.NewLinkServiceClient(hub)
	controlCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	control, err := client.Control(controlCtx)
	if err != nil {
		return err
	}
	if _, err := control.Header(); err != nil {
		return err
	}
	up()

	var sendMu sync.Mutex
	for {
		resp, err := control.Recv()
		if err != nil {
			return err
		}
		d := resp.GetDial()
		if d == nil {
			continue // of a newer hub
		}
		wg.Go(func() {
			err := connect(ctx, client, d, dial)
			if err == nil {
				return
			}
			st := status.Convert(err)
			sendMu.Lock()
			defer sendMu.Unlock()
			// A control stream that is gone has failed all its dials already.
			_ = control.Send(&linkv1.ControlRequest{Failure: &linkv1.DialFailure{
				ConnectionId: d.GetConnectionId(), Code: int32(st.Code()), Message: st.Message(),
			}})
		})
	}
}

// connect answers one dial and carries its bytes until both sides are done. An
// error means that no connection came about.
func connect(ctx context.Context, client linkv1.LinkServiceClient, d *linkv1.Dial, dial Dialer) error {
	dialCtx, cancelDial := context.WithTimeout(ctx, dialTimeout)
	defer cancelDial()
	target, err := dial(dialCtx, d.GetTarget())
	if err != nil {
		return err
	}
	defer target.Close()
	streamCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := client.Connect(streamCtx)
	if err != nil {
		return err
	}
	if err := s.Send(&linkv1.ConnectRequest{Frame: &linkv1.ConnectRequest_ConnectionId{ConnectionId: d.GetConnectionId()}}); err != nil {
		return fmt.Errorf("answer dial: %w", err)
	}
	c := newConn(&nodeStream{s: s, cancel: cancel, over: make(chan struct{})}, addr("node"), addr("hub"))
	Pipe(ctx, c, target)
	return nil
}

type nodeStream struct {
	s      grpc.BidiStreamingClient[linkv1.ConnectRequest, linkv1.ConnectResponse]
	cancel context.CancelFunc
	over   chan struct{} // closed by recv at the end of the call
	once   sync.Once
}

func (n *nodeStream) send(data []byte, fin bool) error {
	if !fin {
		return n.s.Send(&linkv1.ConnectRequest{Frame: &linkv1.ConnectRequest_Data{Data: data}})
	}
	return errors.Join(
		n.s.Send(&linkv1.ConnectRequest{Frame: &linkv1.ConnectRequest_Fin{Fin: true}}),
		n.s.CloseSend(),
	)
}

func (n *nodeStream) recv() ([]byte, error) {
	for {
		resp, err := n.s.Recv()
		switch {
		case err != nil:
			n.once.Do(func() { close(n.over) })
			return nil, eof(err)
		case resp.GetFin():
			return nil, io.EOF
		case len(resp.GetData()) > 0:
			return resp.GetData(), nil
		}
	}
}

func (n *nodeStream) ended() <-chan struct{} { return n.over }

// settle waits for the hub to end the call: cancelling it would drop what the hub
// has not read yet. A hub that never does is let go of in the end.
func (n *nodeStream) settle() {
	timer := time.AfterFunc(settleTimeout, n.cancel)
	context.AfterFunc(n.s.Context(), func() { timer.Stop() })
}

func (n *nodeStream) abort() { n.cancel() }
