package api

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

// GetNode implements NodeService.
func (n *Nodes) GetNode(ctx context.Context, req *cloudcodev1.GetNodeRequest) (*cloudcodev1.Node, error) {
	var v violations
	id := resourceID(&v, "name", "nodes", req.GetName())
	if err := v.err(); err != nil {
		return nil, err
	}
	var out *cloudcodev1.Node
	err := n.config.Store.View(ctx, func(tx store.ReadTx) error {
		node, err := tx.Node(id)
		if errors.Is(err, fleet.ErrNotFound) {
			return grpcerr.New(codes.NotFound, reasonNodeNotFound, "there is no node %q: `cloudcode node list` shows those that are", id)
		} else if err != nil {
			return err
		}
		counts, err := sessionCounts(tx)
		out = protoconv.Node(node, n.config.Heartbeat(id), counts[id])
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// ListNodes implements NodeService.
func (n *Nodes) ListNodes(ctx context.Context, req *cloudcodev1.ListNodesRequest) (*cloudcodev1.ListNodesResponse, error) {
	var v violations
	limit, after := page(&v, "nodes", "", req.GetPageSize(), req.GetPageToken())
	if err := v.err(); err != nil {
		return nil, err
	}
	resp := &cloudcodev1.ListNodesResponse{}
	err := n.config.Store.View(ctx, func(tx store.ReadTx) error {
		counts, err := sessionCounts(tx)
		if err != nil {
			return err
		}
		last := ""
		for node, err := range tx.Nodes(after) {
			if err != nil {
				return err
			}
			if len(resp.Nodes) == limit {
				resp.NextPageToken = nextPage("nodes", "", last)
				return nil
			}
			resp.Nodes = append(resp.Nodes, protoconv.Node(node, n.config.Heartbeat(node.ID), counts[node.ID]))
			last = node.ID
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// sessionCounts counts the sessions that are assigned to each node.
func sessionCounts(tx store.ReadTx) (map[string]int, error) {
	counts := map[string]int{}
	for sess, err := range tx.Sessions("") {
		if err != nil {
			return nil, err
		}
		if sess.Assignment != nil {
			counts[sess.Assignment.Node]++
		}
	}
	return counts, nil
}
