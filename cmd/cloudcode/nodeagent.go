package main

import (
	"github.com/spf13/cobra"

	"github.com/cloudcode-dev/cloudcode/nodeagent"
)

func newNodeAgentCmd() *cobra.Command {
	var f nodeFlags
	cmd := &cobra.Command{
		Use:   "nodeagent",
		Short: "Run the node daemon: it runs sessions on this machine",
		Long: `Run the node daemon, as root. It joins the fleet of --server with a join token,
starts a private containerd (or uses --containerd-address), and runs what the
server assigns. It dials out only: no inbound port is needed.

When it ends, sessions go on running; the next node daemon adopts them.`,
		Example: `  cloudcode nodeagent --server fleet.example.com:7443 --join-token "$TOKEN"`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			m, err := newMember(cmd)
			if err != nil {
				return err
			}
			cfg, err := f.config(m.dataDir, m.server, m.token, m.log)
			if err != nil {
				return err
			}
			agent, err := nodeagent.New(cfg)
			if err != nil {
				return err
			}
			if err := agent.Start(cmd.Context()); err != nil {
				return err
			}
			m.log.Info("node daemon runs", "node", agent.NodeID(), "server", m.server)
			<-cmd.Context().Done()
			m.log.Info("node daemon ends; sessions go on")
			return stopBounded(cmd.Context(), agent.Stop)
		},
	}
	f.add(cmd)
	cmd.Flags().String("join-token", "", "join token of the fleet (default: pki/join-token below the data directory, for a server on this machine)")
	return cmd
}
