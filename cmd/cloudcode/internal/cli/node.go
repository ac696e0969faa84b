package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

func newNodeCmd() *cobra.Command {
	cmd := newGroup("node", "Show the machines that run sessions")
	cmd.Aliases = []string{"nodes"}
	cmd.GroupID = GroupFleet
	cmd.AddCommand(
		&cobra.Command{
			Use:     "list",
			Aliases: []string{"ls"},
			Short:   "List nodes",
			Args:    args(cobra.NoArgs),
			RunE: func(cmd *cobra.Command, _ []string) error {
				return withClient(cmd, func(c *client) error {
					nodes, err := c.listNodes(cmd.Context())
					if err != nil {
						return err
					}
					return printNodes(cmd, nodes)
				})
			},
		},
		&cobra.Command{
			Use:               "get ID",
			Aliases:           []string{"describe"},
			Short:             "Show one node",
			Args:              args(cobra.ExactArgs(1)),
			ValidArgsFunction: completeNodes,
			RunE: func(cmd *cobra.Command, a []string) error {
				name, err := nodeName(a[0])
				if err != nil {
					return err
				}
				return withClient(cmd, func(c *client) error {
					ctx, cancel := c.request(cmd.Context())
					defer cancel()
					n, err := c.nodes.GetNode(ctx, &cloudcodev1.GetNodeRequest{Name: name})
					if err != nil {
						return err
					}
					return printNode(cmd, n)
				})
			},
		},
	)
	return cmd
}

func (c *client) listNodes(ctx context.Context) ([]*cloudcodev1.Node, error) {
	var all []*cloudcodev1.Node
	req := &cloudcodev1.ListNodesRequest{PageSize: 1000}
	for {
		rctx, cancel := c.request(ctx)
		resp, err := c.nodes.ListNodes(rctx, req)
		cancel()
		if err != nil {
			return nil, err
		}
		all = append(all, resp.GetNodes()...)
		if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
			return all, nil
		}
	}
}

func printNodes(cmd *cobra.Command, nodes []*cloudcodev1.Node) error {
	out := cmd.OutOrStdout()
	switch outputOf(cmd) {
	case formatJSON:
		return printJSON(out, &cloudcodev1.ListNodesResponse{Nodes: nodes})
	case formatName:
		for _, n := range nodes {
			fmt.Fprintln(out, n.GetName())
		}
		return nil
	}
	if len(nodes) == 0 {
		fmt.Fprintln(cmd.ErrOrStderr(), "no nodes; start one with `cloudcode nodeagent`")
		return nil
	}
	rows := make([][]string, 0, len(nodes))
	for _, n := range nodes {
		info := n.GetInfo()
		rows = append(rows, []string{
			idOf(n.GetName()), nodeState(n), strconv.Itoa(int(n.GetSessionCount())),
			formatCPU(info.GetCpuMillis()), bytesOrNone(info.GetMemoryBytes()), bytesOrNone(info.GetDiskBytes()),
			age(now(), n.GetHeartbeatTime()), age(now(), n.GetCreateTime()), info.GetVersion(),
		})
	}
	return printTable(out, []string{"ID", "STATE", "SESSIONS", "CPU", "MEMORY", "DISK", "HEARD", "AGE", "VERSION"}, rows)
}

func nodeState(n *cloudcodev1.Node) string {
	state := n.GetState().String()
	if n.GetReason() != "" {
		state += " (" + n.GetReason() + ")"
	}
	return state
}

func printNode(cmd *cobra.Command, n *cloudcodev1.Node) error {
	out := cmd.OutOrStdout()
	switch outputOf(cmd) {
	case formatJSON:
		return printJSON(out, n)
	case formatName:
		_, err := fmt.Fprintln(out, n.GetName())
		return err
	}
	info := n.GetInfo()
	return printFields(out, []field{
		{"ID", idOf(n.GetName())},
		{"State", nodeState(n)},
		{"Message", n.GetMessage()},
		{"Sessions", strconv.Itoa(int(n.GetSessionCount()))},
		{"Labels", pairs(n.GetLabels(), "\n")},
		{"Host", info.GetHostname()},
		{"System", strings.TrimSpace(info.GetOs() + " " + info.GetArchitecture() + " " + info.GetKernelVersion())},
		{"Containers", info.GetContainerRuntimeVersion()},
		{"CPU", formatCPU(info.GetCpuMillis())},
		{"Memory", bytesOrNone(info.GetMemoryBytes())},
		{"Disk", bytesOrNone(info.GetDiskBytes())},
		{"Version", info.GetVersion()},
		{"Heard", timeAndAge(now(), n.GetHeartbeatTime())},
		{"Created", timeAndAge(now(), n.GetCreateTime())},
	})
}

func bytesOrNone(n int64) string {
	if n == 0 {
		return ""
	}
	return formatBytes(n)
}
